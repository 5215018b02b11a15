"""`make methods`: every objective from the same base, judged on the same pictures, in one table and one plot.

Those that learn from data see the same number of images. Those that sample while they train (`python -m benchmarks
methods spo d3po ddpo draft`) run as long as their recipe says and are marked as online.

Each method trains with its configs/tiny/<name>.yaml in a process of its own and draws the held-out prompts of the demo,
two pictures each. Interrupted, it goes on with the methods that have no row yet (runs/methods/<name>/row.json).
"""

import csv
import datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.method_runs import IMAGES_PER_PROMPT, N_PROMPTS, ROOT, SETTINGS, STEPS, is_online, row_of
from diffalign import objectives
from diffalign.jobs.training.train import versions

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    "method",
    "oracle",
    "gain (95 %)",
    "win rate (95 %)",
    "PickScore",
    "HPSv2",
    "examples",
    "UNet images",
    "decoded",
    "examples/s",
    "memory",
)


def methods_by_default(output: Path) -> list[str]:
    """Return the methods that learn from data, and of those that sample while they train the ones with a row."""
    return [name for name in known() if not is_online(name) or (output / name / "row.json").exists()]


def known() -> list[str]:
    """Return all methods: the objectives, and what are settings of one."""
    return [*objectives.names(), *SETTINGS]


def main(only: list[str], output: Path, table_only: bool = False) -> None:
    """Train and judge the methods named (all if none are), then write table, CSV and plot.

    With `table_only` nothing is trained: methods without a row are listed as not measured.
    """
    unknown = sorted(set(only) - set(known()))
    if unknown:
        raise SystemExit(f"Unknown method {unknown[0]}. Available: {', '.join(known())}.")
    rows, missing = [], []
    for name in only or methods_by_default(output):
        if table_only and not (output / name / "row.json").exists():
            missing.append(name)
            continue
        rows.append(row_of(name, output / name))
        print(line_of(rows[-1]), flush=True)
    rows.sort(key=lambda row: -row["scores"]["oracle"]["win_rate"])
    write_table(rows, missing)
    write_csv(rows)
    plot(rows, RESULTS / "methods.png")


def line_of(row: dict[str, Any]) -> str:
    """Word one row for a terminal."""
    oracle = row["scores"]["oracle"]
    return (
        f"{row['method']}: oracle {oracle['base']:.3f} -> {oracle['aligned']:.3f}, win rate {oracle['win_rate']:.3f} "
        f"({oracle['low']:.3f} to {oracle['high']:.3f}), {row['train_seconds']:.0f} s"
    )


def write_table(rows: list[dict[str, Any]], missing: list[str]) -> None:
    """Write the markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(cells_of, rows)]
    if missing:
        lines += ["", f"Not measured: {', '.join(f'`{name}`' for name in missing)}."]
    (RESULTS / "methods.md").write_text(head(rows) + "\n".join(lines) + "\n", encoding="utf8")


def head(rows: list[dict[str, Any]]) -> str:
    """Word how the rows came about."""
    base = rows[0]["scores"]["oracle"]["base"]
    found, pairs, images = versions(), 16 * STEPS, 32 * STEPS
    return f"""# Every method on the embedded world

{datetime.date.today().isoformat()}; {torch.get_num_threads()} CPU threads, torch {found["torch"]}, diffusers
{found["diffusers"]}. Made by `make methods`. Every method starts from `assets/tiny-sdxl`. Those that learn from data
see {images:,} images in {STEPS} steps ({pairs:,} pairs; SFT their winners), with configs/tiny/METHOD.yaml, which are
made for twice as many. Those marked "online" draw their own pictures for as long as their recipe says, judged by its
reward model: an example is a transition (`spo`, `lpo`, `d3po`, `ddpo`, `dpok`) or a picture (`draft`, `refl`,
`alignprop`), and a reward model they were trained on says little about them.
Judged on {N_PROMPTS} held-out prompts with {IMAGES_PER_PROMPT} pictures each, from the same noise as the base (oracle
mean {base:.3f}); gains of the mean and win rates
against the base with a paired bootstrap over prompts. One training run each: the intervals
say nothing about another seed. "UNet images" are images through the network per example, with + without gradient;
"decoded" are latents through the VAE's decoder per example.
Other work shared the machine, so examples/s are rough.

"""


def cells_of(row: dict[str, Any]) -> str:
    """Return the line of one method."""
    scores, oracle, rate = row["scores"], row["scores"]["oracle"], row["examples_per_second"]
    cells = [
        f"`{row['method']}`" + (" (online)" if is_online(row["method"]) else ""),
        f"{oracle['aligned']:.3f}",
        gain_of(oracle),
        f"{oracle['win_rate']:.3f} ({oracle['low']:.3f} to {oracle['high']:.3f})",
        *(f"{scores[name]['win_rate']:.3f}" for name in ("pickscore", "hpsv2")),
        f"{row['examples']:,}",
        f"{row['images_with_gradient']:.1f} + {row['images_without_gradient']:.1f}",
        f"{row.get('decoded', 0.0):.1f}",  # rows written before online methods were measured have none
        f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
        f"{row['peak_memory_gib']:.2f} GiB",
    ]
    return "| " + " | ".join(cells) + " |"


def gain_of(scores: dict[str, float]) -> str:
    """Word aligned - base, with its interval where the row has one: the first rows were written without."""
    gain = f"{scores['aligned'] - scores['base']:+.3f}"
    if "gain_low" not in scores:
        return gain
    return f"{gain} ({scores['gain_low']:+.3f} to {scores['gain_high']:+.3f})"


def write_csv(rows: list[dict[str, Any]]) -> None:
    """Write all numbers, one line a method and scorer."""
    with (RESULTS / "methods.csv").open("w", newline="", encoding="utf8") as file:
        writer = None
        for row in rows:
            plain = {"decoded": 0.0} | {key: value for key, value in row.items() if not isinstance(value, dict)}
            for scorer, result in row["scores"].items():
                line = {**plain, "scorer": scorer, "gain_low": "", "gain_high": "", **result}
                if writer is None:
                    writer = csv.DictWriter(file, line)
                    writer.writeheader()
                writer.writerow(line)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the methods' win rates, best first."""
    names = [row["method"] + (" (online)" if is_online(row["method"]) else "") for row in rows]
    plot_win_rates(names, [row["scores"]["oracle"] for row in rows], file)


def plot_win_rates(names: list[str], oracles: list[dict[str, float]], file: Path) -> None:
    """Draw the oracle's win rates with intervals, the first on top."""
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1.2), layout="constrained")
    for place, oracle in enumerate(oracles[::-1]):
        sure = oracle["low"] > 0.5
        axes.plot([oracle["low"], oracle["high"]], [place, place], color="#4a6fa5" if sure else "#b0b0b0", lw=2)
        axes.plot(oracle["win_rate"], place, "o", color="#1f3a5f" if sure else "#808080", ms=5)
    axes.axvline(0.5, color="#c0392b", lw=1, ls="--")
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlabel("oracle win rate against the base, 95 % interval over prompts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
