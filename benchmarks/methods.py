"""`make methods`: every objective from the same base on the same number of images, in one table and one plot.

Each method trains with its configs/tiny/<name>.yaml in a process of its own and draws the held-out prompts of the demo,
two pictures each. Interrupted, it goes on with the methods that have no row yet (runs/methods/<name>/row.json).
"""

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.method_runs import IMAGES_PER_PROMPT, N_PROMPTS, ROOT, STEPS
from diffalign import objectives
from diffalign.jobs.train import versions

RESULTS = ROOT / "benchmarks" / "results"
LAYOUTS = ("pair", "single", "list")
COLUMNS = ("method", "oracle", "win rate (95 %)", "PickScore", "HPSv2", "UNet images", "examples/s", "memory")


def offline_methods() -> list[str]:
    """Return the objectives that learn from data: those that sample while they train have other costs."""
    return [name for name in objectives.names() if objectives.objective_class(name).layout in LAYOUTS]


def main(only: list[str], output: Path, table_only: bool = False) -> None:
    """Train and judge the methods named (all if none are), then write table, CSV and plot.

    With `table_only` nothing is trained: methods without a row are listed as not measured.
    """
    unknown = sorted(set(only) - set(objectives.names()))
    if unknown:
        raise SystemExit(f"Unknown method {unknown[0]}. Available: {', '.join(objectives.names())}.")
    rows, missing = [], []
    for name in only or offline_methods():
        file = output / name / "row.json"
        if not file.exists() and table_only:
            missing.append(name)
            continue
        if not file.exists():
            print(f"{name} ...", flush=True)
            command = [sys.executable, "-m", "benchmarks.method_runs", name, str(output / name)]
            subprocess.run(command, check=True, cwd=ROOT)
        rows.append(json.loads(file.read_text(encoding="utf8")))
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
    base = rows[0]["scores"]["oracle"]["base"]
    found, pairs, images = versions(), 16 * STEPS, 32 * STEPS
    head = f"""# Every method on the embedded world

{datetime.date.today().isoformat()}; {torch.get_num_threads()} CPU threads, torch {found["torch"]}, diffusers
{found["diffusers"]}. Made by `make methods`. Every method starts from `assets/tiny-sdxl` and sees {images:,} images
in {STEPS} steps ({pairs:,} pairs; SFT their winners), with configs/tiny/METHOD.yaml, which are made for twice as many.
Judged on {N_PROMPTS} held-out prompts with {IMAGES_PER_PROMPT} pictures each, from the same noise as the base (oracle
mean {base:.3f}); win rates against the base with a paired bootstrap over prompts. One training run each: the intervals
say nothing about another seed. "UNet images" are images through the network per example, with + without gradient.
Other work shared the machine, so examples/s are rough.

"""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        scores = row["scores"]
        oracle = scores["oracle"]
        cells = [
            f"`{row['method']}`",
            f"{oracle['aligned']:.3f}",
            f"{oracle['win_rate']:.3f} ({oracle['low']:.3f} to {oracle['high']:.3f})",
            *(f"{scores[name]['win_rate']:.3f}" for name in ("pickscore", "hpsv2")),
            f"{row['images_with_gradient']:.1f} + {row['images_without_gradient']:.1f}",
            f"{row['examples_per_second']:.0f}",
            f"{row['peak_memory_gib']:.2f} GiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"Not measured: {', '.join(f'`{name}`' for name in missing)}."]
    (RESULTS / "methods.md").write_text(head + "\n".join(lines) + "\n", encoding="utf8")


def write_csv(rows: list[dict[str, Any]]) -> None:
    """Write all numbers, one line a method and scorer."""
    with (RESULTS / "methods.csv").open("w", newline="", encoding="utf8") as file:
        writer = None
        for row in rows:
            plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
            for scorer, result in row["scores"].items():
                line = {**plain, "scorer": scorer, **result}
                if writer is None:
                    writer = csv.DictWriter(file, line)
                    writer.writeheader()
                writer.writerow(line)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw win rates with intervals, best first."""
    shown = rows[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(shown):
        oracle = row["scores"]["oracle"]
        sure = oracle["low"] > 0.5
        axes.plot([oracle["low"], oracle["high"]], [place, place], color="#4a6fa5" if sure else "#b0b0b0", lw=2)
        axes.plot(oracle["win_rate"], place, "o", color="#1f3a5f" if sure else "#808080", ms=5)
    axes.axvline(0.5, color="#c0392b", lw=1, ls="--")
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axes.set_xlabel("oracle win rate against the base, 95 % interval over prompts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
