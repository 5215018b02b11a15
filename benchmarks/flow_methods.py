"""`python -m benchmarks flow-methods`: methods on the embedded flow model, three training seeds each.

A method first runs every beta of its own short grid on the tuning prompts, which the table never shows; the beta with
the highest win rate by the oracle is trained from three seeds and judged on the demo's prompts. Every method gets as
many tuning runs, steps and images as every other. Interrupted, it goes on where it was.
"""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.method_runs import row_of
from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.statistics import mean_difference, seeded_bootstrap, win_rate
from diffalign.jobs.training.train import versions

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS = 250
COLUMNS = ("method", "beta", "oracle", "gain (95 %)", "win rate (95 %)", "of each seed", "PickScore", "HPSv2")
COLUMNS += ("tuning: win rate by beta", "seconds")
# Of every method three betas; DPO's is the weight of the margin, whose size on velocities nothing here is known of.
BETAS: dict[str, tuple[float, ...]] = {
    "dpo": (500.0, 2000.0, 8000.0),
    "ipo": (500.0, 2000.0, 8000.0),
    "kto": (250.0, 1000.0, 4000.0),
    "mapo": (1.0, 3.0, 10.0),
    "smpo": (500.0, 2000.0, 8000.0),
    "linear_dpo": (500.0, 2000.0, 8000.0),
    "rankdpo": (500.0, 2000.0, 8000.0),
    "plackett_luce": (500.0, 2000.0, 8000.0),
}


def main(only: list[str], output: Path) -> None:
    """Tune, train and judge the methods named (all if none are), and write the table of all that have their runs.

    Raises:
        SystemExit: an unknown method.
    """
    if unknown := [name for name in only if name not in BETAS]:
        raise SystemExit(f"Unknown method {unknown[0]}. Available: {', '.join(BETAS)}.")
    for name in only or BETAS:
        beta = best_beta(name, output)
        for seed in SEEDS:
            row_of(f"tiny-sd3/{name}", output / f"{name}-{seed}", changes(beta, seed))
    finished = [name for name in BETAS if all((output / f"{name}-{seed}" / "row.json").exists() for seed in SEEDS)]
    rows = sorted((result_of(name, output) for name in finished), key=lambda row: -row["win_rate"])
    (RESULTS / "flow-methods.json").write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")
    (RESULTS / "flow-methods.md").write_text(table(rows), encoding="utf8")


def best_beta(name: str, output: Path) -> float:
    """Return the beta of the method's grid that wins most on the tuning prompts, each trained once."""
    rates = {}
    for beta in BETAS[name]:
        row = row_of(f"tiny-sd3/{name}", output / "tuning" / f"{name}-{beta:g}", changes(beta, 100), tuning=True)
        rates[beta] = row["scores"]["oracle"]["win_rate"]
        print(f"{name}, beta {beta:g}: {rates[beta]:.3f} on the tuning prompts", flush=True)
    return max(rates, key=lambda beta: rates[beta])


def changes(beta: float, seed: int) -> list[str]:
    """Return what a run sets differently from its recipe."""
    return [f"objective.beta={beta}", f"train.seed={seed}", f"train.max_train_steps={STEPS}"]


def result_of(name: str, output: Path) -> dict[str, Any]:
    """Return a method's rates over seeds and prompts."""
    runs = [output / f"{name}-{seed}" for seed in SEEDS]
    rows = [json.loads((run / "row.json").read_text()) for run in runs]
    result: dict[str, Any] = {"method": name, "beta": rows[0]["objective"]["beta"]}
    for scorer in ("oracle", "pickscore", "hpsv2"):
        tables = [Comparison.read(run).per_prompt(scorer) for run in runs]
        aligned, base = (np.stack([table[column] for table in tables]) for column in ("aligned", "base"))
        prefix = "" if scorer == "oracle" else f"{scorer}_"
        result[f"{prefix}win_rate"] = float(win_rate(aligned, base).mean())
        if scorer == "oracle":
            result |= {"base": float(base.mean()), "aligned": float(aligned.mean())}
            result["seeds"] = win_rate(aligned, base).round(4).tolist()
            result["interval"] = list(seeded_bootstrap(aligned, base))
            result["gain_interval"] = list(seeded_bootstrap(aligned, base, mean_difference))
    tuned = {beta: output / "tuning" / f"{name}-{beta:g}" / "row.json" for beta in BETAS[name]}
    result["tuning"] = {
        f"{beta:g}": json.loads(file.read_text())["scores"]["oracle"]["win_rate"] for beta, file in tuned.items()
    }
    result["seconds"] = float(np.median([row["train_seconds"] for row in rows]))
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Word the results in Markdown."""
    found = versions()
    head = f"""# Methods on the embedded flow model

{datetime.date.today().isoformat()}; {platform.processor() or platform.machine()}, one thread a run,
torch {found["torch"]}, diffusers {found["diffusers"]}. Made by `python -m benchmarks flow-methods`: `assets/tiny-sd3`,
{STEPS} steps of 16 pairs, 32 single images or 5 lists of six, LoRA of rank 16, configs/tiny-sd3. Beta is the best of
three by the oracle's win rate on the 144 tuning prompts; everything else is the same for all methods. Then three
training seeds, judged on the 256 prompts of the demo, which nobody tuned on, one picture each, from the same noise as
the base (oracle mean {rows[0]["base"]:.3f}). Intervals are 95 %, over seeds and prompts (pigeonhole bootstrap). Other
work shared the machine, so seconds are rough.

"""
    return head + f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "".join(map(line, rows))


def line(row: dict[str, Any]) -> str:
    """Return the line of one method."""
    cells = [
        f"`{row['method']}`",
        f"{row['beta']:g}",
        f"{row['aligned']:.3f}",
        f"{row['aligned'] - row['base']:+.3f} ({row['gain_interval'][0]:+.3f} to {row['gain_interval'][1]:+.3f})",
        f"{row['win_rate']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})",
        " ".join(f"{rate:.3f}" for rate in row["seeds"]),
        f"{row['pickscore_win_rate']:.3f}",
        f"{row['hpsv2_win_rate']:.3f}",
        ", ".join(f"{beta}: {rate:.3f}" for beta, rate in row["tuning"].items()),
        f"{row['seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |\n"
