"""`make label-noise`: DPO against robust and conservative DPO when 0 to 30 % of the labels are flipped.

The pairs' own labels already go against the oracle in 7 % of the cases; the flips come on top.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.method_runs import ROOT, row_of

RESULTS = ROOT / "benchmarks" / "results"
FLIPPED = (0.0, 0.1, 0.2, 0.3)


def variants(rate: float) -> dict[str, tuple[str, list[str]]]:
    """Return by label the configuration and its overrides; the corrected losses are told the true rate."""
    smoothing = f"objective.label_smoothing={rate}"
    return {
        "DPO": ("dpo", []),
        "robust DPO": ("robust_dpo", [smoothing]),
        "conservative DPO": ("dpo", [smoothing]),
    }


def main(output: Path) -> None:
    """Train and judge all variants that have no row yet; write numbers and plot."""
    rows: list[dict[str, Any]] = []
    for rate in FLIPPED:
        for label, (name, overrides) in variants(rate).items():
            if rate == 0 and label != "DPO":
                continue  # without noise all three are DPO
            folder = output / f"{label.replace(' ', '-').lower()}-{rate:.0%}".replace("%", "")
            oracle = row_of(name, folder, [*overrides, f"data.flip_labels={rate}"])["scores"]["oracle"]
            rows.append({"objective": label, "flipped": rate, **oracle})
            print(rows[-1], flush=True)
    (RESULTS / "label-noise.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    plot(rows, RESULTS / "label-noise.png")


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the oracle's win rate over the rate of flipped labels."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    clean = next(row for row in rows if row["flipped"] == 0)
    for shift, label in enumerate(dict.fromkeys(row["objective"] for row in rows)):
        own = [clean, *(row for row in rows if row["objective"] == label and row["flipped"] > 0)]
        x = [100 * row["flipped"] + 0.4 * (shift - 1) for row in own]
        y = [row["win_rate"] for row in own]
        bars = [[row["win_rate"] - row["low"] for row in own], [row["high"] - row["win_rate"] for row in own]]
        axes.errorbar(x, y, bars, marker="o", capsize=3, label=label)
    axes.axhline(0.5, color="#c0392b", lw=1, ls="--")
    axes.set_xlabel("labels flipped (%)")
    axes.set_ylabel("oracle win rate against the base")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
