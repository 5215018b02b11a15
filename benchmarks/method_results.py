"""From rows to what is shown of the comparison of methods: a table, its numbers, and a plot."""

import csv
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.method_plan import TRIAL_SHARE, Request, Run, label_of
from benchmarks.method_runs import IMAGES_PER_PROMPT
from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.statistics import mean_difference, seeded_bootstrap, win_rate
from diffalign.jobs.training.train import versions
from diffalign.jobs.world.demo import N_PROMPTS
from diffalign.progress import clock

SCORERS = ("oracle", "pickscore", "hpsv2")
JUDGED = ("oracle", "gain (95 %)", "win rate (95 %)", "beats base", "of each seed", "PickScore", "HPSv2")
COSTS = ("images a pair", "ms a pair", "a run")
Performed = tuple[Run, dict[str, Any]]


@dataclass
class Tables:
    """Hold everything that is shown."""

    results: list[dict[str, Any]] = field(default_factory=list)  # of `result_of`, the compared methods
    runs: list[Performed] = field(default_factory=list)  # what the results are made of
    trials: list[Performed] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what is not in the table, and why


def result_of(runs: Sequence[Performed], **named: Any) -> dict[str, Any]:
    """Return what the runs of a method, one a seed, say together; `named` are further entries.

    Rates are means over seeds and prompts, their intervals the pigeonhole bootstrap's over both.
    """
    rows = [row for _, row in runs]
    comparisons = [Comparison.read(run.folder) for run, _ in runs]
    result: dict[str, Any] = {"method": runs[0][0].method, **named, "seeds": len(runs)}
    for scorer in SCORERS:
        tables = [comparison.per_prompt(scorer) for comparison in comparisons]
        aligned, base = (np.stack([table[column] for table in tables]) for column in ("aligned", "base"))
        if scorer != "oracle":
            result[f"{scorer}_win_rate"] = float(win_rate(aligned, base).mean())
            continue
        result |= {"base": float(base.mean()), "aligned": float(aligned.mean()), "prompts": aligned.shape[1]}
        result["gain"] = result["aligned"] - result["base"]
        result["gain_interval"] = list(seeded_bootstrap(aligned, base, mean_difference))
        rates = win_rate(aligned, base)
        result |= {"win_rate": float(rates.mean()), "interval": list(seeded_bootstrap(aligned, base))}
        result |= {"of_each_seed": rates.round(4).tolist(), "beats_base": beats_base(result["interval"])}
    seconds = float(np.median([row["train_seconds"] for row in rows]))
    counts = {key: np.mean([row[key] for row in rows]) for key in ("examples", "pairs", "decoded")}
    for key in ("images_with_gradient", "images_without_gradient"):
        result[f"{key}_per_pair"] = float(np.mean([row[key] for row in rows]) * counts["examples"] / counts["pairs"])
    result |= {key: float(count) for key, count in counts.items()}
    return result | {"train_seconds": seconds, "seconds_per_pair": seconds / result["pairs"]}


def beats_base(interval: Sequence[float]) -> str:
    """Word what an interval of the win rate says: "unclear" if 0.5 lies in it."""
    low, high = interval
    return "yes" if low > 0.5 else "no" if high < 0.5 else "unclear"


def write(request: Request, tables: Tables, folder: Path) -> None:
    """Write table, numbers, trials and plot; results of untuned recipes have names of their own."""
    stem = request.known.results + ("" if request.tuned else "-untuned")
    results = sorted(tables.results, key=lambda result: -result["win_rate"])
    record = {"date": datetime.date.today().isoformat(), "versions": versions(), "rows": results}
    record["missing"] = tables.missing
    _write(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    _write(folder / f"{stem}.md", page(request, results, tables))
    write_csv(tables.runs, folder / f"{stem}.csv")
    if request.tuned:
        lines = json.dumps([trial_of(*trial) for trial in tables.trials], indent=1) + "\n"
        _write(folder / f"{stem}-trials.json", lines)
    if results:
        ends = ("win_rate", "low", "high")
        rates = [dict(zip(ends, (result["win_rate"], *result["interval"]), strict=True)) for result in results]
        plot_win_rates([_name(result) for result in results], rates, folder / f"{stem}.png", over="seeds and prompts")


def write_variants(request: Request, results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the table of recipes with other settings, and its numbers."""
    stem = f"{request.known.results}-variants"
    _write(folder / f"{stem}.json", json.dumps(list(results), indent=1) + "\n")
    text = f"# Variants on `assets/{request.known.base}`\n\n"
    compared = f"[all methods]({request.known.results}.md)"
    text += f"""Recipes with other settings, made by `python -m benchmarks methods --label`, judged as {compared}
are: on the {N_PROMPTS} prompts of the demo, or on the others, which are for tuning. A variant chosen for its numbers on
the demo's prompts has an advantage over methods that were not.

"""
    columns = ("variant", "method", "sets", "prompts", *JUDGED, *COSTS)
    _write(folder / f"{stem}.md", text + _table(columns, [_cells(result) for result in results]))


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf8")


def trial_of(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a trial."""
    kept = {"method": run.method, "settings": run.settings, "steps": _steps(run), "seconds": row["seconds"]}
    if "failed" in row:
        return kept | {"failed": row["failed"]}
    oracle = row["scores"]["oracle"]
    gain = oracle["aligned"] - oracle["base"]
    return kept | {"win_rate": oracle["win_rate"], "low": oracle["low"], "high": oracle["high"], "gain": gain}


def _steps(run: Run) -> int:
    (steps,) = (change.partition("=")[2] for change in run.changes if change.startswith("train.max_train_steps="))
    return int(steps)


def page(request: Request, results: Sequence[Mapping[str, Any]], tables: Tables) -> str:
    """Return the table with how it came about, and what is missing."""
    settings = "best of the trials" if request.tuned else "settings"
    text = f"# {request.known.title}\n\n{head(request, results)}\n"
    text += _table(("method", settings, *JUDGED, *COSTS), [_cells(result) for result in results])
    if tables.missing:
        text += "\nNot in the table:\n\n" + "".join(f"* {line}\n" for line in tables.missing)
    return text


def head(request: Request, results: Sequence[Mapping[str, Any]]) -> str:
    """Word how the rows came about."""
    found, steps = versions(), request.steps or request.known.steps
    base = f" (oracle mean {results[0]['base']:.3f})" if results else ""
    made = "make methods" if request.model == "sdxl" else f"python -m benchmarks methods --model {request.model}"
    trials = f"{request.known.results}-trials.json"
    spaces = "[search_spaces.yaml](../search_spaces.yaml)"
    tuned = f"""Every method had {request.trials} short trials of its line in {spaces}:
its recipe at {TRIAL_SHARE:.2f} of the length, judged by the oracle on the held-out prompts after the first {N_PROMPTS},
which no table shows. The settings with the highest win rate were then trained at full length. All trials:
[{trials}]({trials})."""
    untuned = "Nothing is tuned: every method has its recipe's own settings."
    plural, over = "", "prompts; they say nothing about another seed"
    if request.seeds > 1:
        plural, over = "s", "seeds and prompts (pigeonhole bootstrap)"
    today, machine = datetime.date.today().isoformat(), platform.processor() or platform.machine()
    return f"""{today}; {machine}, torch {found["torch"]}, diffusers
{found["diffusers"]}. Made by `{made}` with configs/{request.known.recipes}/METHOD.yaml.

{tuned if request.tuned else untuned}

Methods that learn from data see {32 * steps:,} images in {steps} steps: 16 pairs a step (SFT their winners), 32 single
images, or lists that are 30 or 32 together. Those marked "online" draw their own pictures for as long as their recipe
says, judged by its reward model; a reward model they were trained on says little about them.

Then {request.seeds} training seed{plural} each, judged on the {N_PROMPTS} prompts of the demo, {IMAGES_PER_PROMPT}
pictures each, from the same noise as the base{base}. Intervals are 95 %, over
{over}. A method beats the base if the whole interval of its win rate by the
oracle is above 0.5 ("no": below). "images a pair" pass through the network with + without gradient; of online methods,
per transition or drawn picture. "a run" is the time of training alone; other work may have shared the machine.
"""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(result: Mapping[str, Any]) -> list[str]:
    """Return the line of a method, or of a variant."""
    if "variant" in result:
        prompts = "tuning" if result["tuning"] else "demo"
        first = [f"`{result['variant']}`", _name(result), " ".join(result["sets"]), prompts]
    else:
        first = [_name(result), label_of(result["settings"])]
    return [
        *first,
        f"{result['aligned']:.3f}",
        f"{result['gain']:+.3f} ({result['gain_interval'][0]:+.3f} to {result['gain_interval'][1]:+.3f})",
        f"{result['win_rate']:.3f} ({result['interval'][0]:.3f} to {result['interval'][1]:.3f})",
        result["beats_base"],
        " ".join(f"{rate:.3f}" for rate in result["of_each_seed"]),
        f"{result['pickscore_win_rate']:.3f}",
        f"{result['hpsv2_win_rate']:.3f}",
        f"{result['images_with_gradient_per_pair']:.1f} + {result['images_without_gradient_per_pair']:.1f}",
        f"{1000 * result['seconds_per_pair']:.0f}",
        clock(result["train_seconds"]),
    ]


def _name(result: Mapping[str, Any]) -> str:
    return f"`{result['method']}`" + (" (online)" if result["online"] else "")


def write_csv(runs: Sequence[Performed], file: Path) -> None:
    """Write all numbers of the compared runs, one line a run and scorer."""
    lines = []
    for run, row in runs:
        plain = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        named = {**plain, "method": run.method, "seed": run.folder.name.rpartition("-")[2]}
        named["settings"] = label_of(run.settings)
        lines += [{**named, "scorer": scorer, **numbers} for scorer, numbers in row["scores"].items()]
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf8") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def gain_of(scores: Mapping[str, float]) -> str:
    """Word aligned - base of one run, with its interval over prompts."""
    gain = scores["aligned"] - scores["base"]
    return f"{gain:+.3f} ({scores['gain_low']:+.3f} to {scores['gain_high']:+.3f})"


def plot_win_rates(
    names: Sequence[str], oracles: Sequence[Mapping[str, float]], file: Path, over: str = "prompts"
) -> None:
    """Draw the oracle's win rates with intervals, the first on top."""
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1.2), layout="constrained")
    for place, oracle in enumerate(oracles[::-1]):
        sure = oracle["low"] > 0.5
        axes.plot([oracle["low"], oracle["high"]], [place, place], color="#4a6fa5" if sure else "#b0b0b0", lw=2)
        axes.plot(oracle["win_rate"], place, "o", color="#1f3a5f" if sure else "#808080", ms=5)
    axes.axvline(0.5, color="#c0392b", lw=1, ls="--")
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlabel(f"oracle win rate against the base, 95 % interval over {over}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
