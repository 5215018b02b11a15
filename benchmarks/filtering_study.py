"""`make filtering-study`: DPO on all pairs against DPO on a tenth chosen by a filter, with 30 % of the labels flipped.

The noisy pairs are written first, so the filter reads the labels that training sees; a column tells which were flipped.
Every selection trains for the same number of steps and is judged as `make methods` does. A folder is named after its
pairs: interrupted, the study goes on with the selections that have no row yet, and other pairs get another folder.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.method_results import gain_of, plot_win_rates
from benchmarks.method_runs import IMAGES_PER_PROMPT, ROOT, STEPS, row_of
from diffalign.data import open_pairs
from diffalign.data.annotated import flips
from diffalign.data.fingerprints import digest_files
from diffalign.evaluation.manifest import atomic_write
from diffalign.filtering.components import Components
from diffalign.filtering.importance import ImportanceSettings
from diffalign.jobs.scoring.filter import TRAIN, Request, filter_pairs
from diffalign.jobs.world.demo import N_PROMPTS

RESULTS = ROOT / "benchmarks" / "results"
PAIRS, JUDGE = ROOT / "assets" / "tiny-pairs", ROOT / "assets" / "tiny-pickscore"
RATE, SEED, KEEP = 0.3, 0, 0.1
FLIPPED = "flipped"  # the column


@dataclass(frozen=True)
class Selection:
    """Name a way to choose a tenth of the pairs, and how `diffalign filter` spells it."""

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> str:
        """Return the options on the command line."""
        words = {"margin": f"--margin {self.settings.get('margin')}", "require_agreement": "--require-agreement"}
        return " ".join([f"--method {self.method}", *(words[name] for name in self.settings)])


SIGNED, ABSOLUTE = {"margin": "signed"}, {"margin": "absolute"}
SELECTIONS = {
    "fifa-signed": Selection("FiFA, signed margin", "fifa", SIGNED),
    "random": Selection("random", "random"),
    "fifa": Selection("FiFA, absolute margin", "fifa", ABSOLUTE),
    "fifa-agreed": Selection("FiFA, agreeing pairs", "fifa", {**ABSOLUTE, "require_agreement": True}),
    "margin-signed": Selection("signed margin alone", "margin", SIGNED),
    "margin": Selection("absolute margin alone", "margin", ABSOLUTE),
    "quality-aware": Selection("quality-aware ranking", "quality-aware"),
}


def main(output: Path, text_quality: Path | None = None) -> None:
    """Choose, train and judge whatever has no row yet; write numbers, table and plot.

    `text_quality` is a file of ratings as `diffalign filter --text-quality` reads it; without one FiFA's term is left
    out, as the prompts of the embedded world are all of one grammar.
    """
    noisy = flip_pairs(output / "noisy")
    rows = [measure("everything", "", noisy, output)]
    for name, selection in SELECTIONS.items():
        chosen = choose(name, noisy, output / "filter", text_quality=text_quality)
        rows.append(measure(selection.label, selection.options, chosen, output))
        write(rows, text_quality)


def write(rows: list[dict[str, Any]], text_quality: Path | None) -> None:
    """Write what is measured so far, best first."""
    rows = sorted(rows, key=lambda row: -row["scores"]["oracle"]["win_rate"])
    (RESULTS / "filtering.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    (RESULTS / "filtering.md").write_text(page(rows, text_quality), encoding="utf8")
    names = [f"{row['selection']} ({row['flipped_share']:.0%} flipped)" for row in rows]
    plot_win_rates(names, [row["scores"]["oracle"] for row in rows], RESULTS / "filtering.png")


def flip_pairs(folder: Path, limit: int | None = None) -> Path:
    """Write the embedded pairs with the labels flipped that `data.flip_labels` with train.seed 0 would flip.

    Ties are left out. Returns the folder, for data.train_data_dir.
    """
    file = folder / TRAIN
    if file.exists():
        return folder
    pairs = Components.of(open_pairs(str(PAIRS), max_samples=limit), "").table
    turned = pairs[flips(pairs["example_id"].to_numpy(), RATE, SEED)]
    table = pq.read_table(PAIRS / TRAIN)
    mask = np.zeros(len(table), dtype=bool)
    mask[turned["row"].to_numpy()] = True
    columns = {name: table.column(name).to_numpy() for name in ("label_0", "label_1")}
    first, second = (table.column(f"image_{k}_uid").to_numpy() for k in (0, 1))
    worst = np.where(columns["label_0"] < columns["label_1"], first, second)
    written = {
        "label_0": np.where(mask, columns["label_1"], columns["label_0"]),
        "label_1": np.where(mask, columns["label_0"], columns["label_1"]),
        "best_image_uid": np.where(mask, worst, table.column("best_image_uid").to_numpy()),
    }
    for name, values in written.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.sort(pairs["row"].to_numpy())
    with atomic_write(file) as temporary:
        pq.write_table(table.append_column(FLIPPED, pa.array(mask)).take(rows), temporary)
    return folder


def choose(name: str, noisy: Path, folder: Path, *, text_quality: Path | None = None, keep: float | int = KEEP) -> Path:
    """Run `diffalign filter` on the noisy pairs; return the folder of the chosen ones.

    All selections share one folder of scores and distances.
    """
    selection = SELECTIONS[name]
    request = Request(
        source=str(noisy),
        out=folder,
        method=selection.method,
        keep=keep,
        scorer=f"pickscore={JUDGE}",
        text_encoder=str(JUDGE),
        text_quality=text_quality,
        settings=ImportanceSettings(**selection.settings),
        seed=SEED,
    )
    filter_pairs(request, command=f"diffalign filter {noisy} {selection.options}", console=Console(quiet=True))
    chosen = folder / name
    chosen.mkdir(exist_ok=True)
    shutil.copyfile(folder / TRAIN, chosen / TRAIN)
    return chosen


def flipped_share(folder: Path) -> tuple[int, float]:
    """Return how many pairs there are, and the share of them whose label was flipped."""
    flipped = pq.read_table(folder / TRAIN, columns=[FLIPPED]).column(FLIPPED).to_numpy()
    return len(flipped), float(flipped.mean())


def measure(label: str, options: str, pairs: Path, output: Path) -> dict[str, Any]:
    """Train DPO on a folder of pairs, judge it, and return its row."""
    (digest,) = digest_files([pairs / TRAIN])
    run = output / f"dpo-{pairs.name}-{digest[:8]}"
    count, share = flipped_share(pairs)
    row = {"selection": label, "options": options, "pairs": count, "flipped_share": share}
    row |= row_of("dpo", run, [f"data.train_data_dir={pairs}"])
    print(cells_of(row), flush=True)
    return row


def page(rows: list[dict[str, Any]], text_quality: Path | None) -> str:
    """Return the table with what it took."""
    columns = ("selection", "`diffalign filter`", "pairs", "flipped", "oracle", "gain (95 %)", "win rate (95 %)")
    quality = f"ratings of {text_quality.name}" if text_quality else "left out (no ratings)"
    head = f"""# DPO on chosen pairs, with {RATE:.0%} of the labels flipped

Made by `make filtering-study`: configs/tiny/dpo.yaml for {STEPS} steps of 16 pairs, whatever the number of pairs, on
`assets/tiny-pairs` with flipped labels, which the filter sees as well; a selection keeps {KEEP:.0%}. Scorer and text
encoder: `assets/tiny-pickscore`, which was trained on this world's unflipped pairs and so knows more than a scorer in
the wild would. Text quality: {quality}. "flipped" is the share of our flips among the pairs kept; 7 % of the labels go
against the oracle before any flip. Judged on {N_PROMPTS} held-out prompts with {IMAGES_PER_PROMPT} pictures each,
against the base (oracle mean {rows[0]["scores"]["oracle"]["base"]:.3f}), with intervals over prompts. One training run
each: the intervals say nothing about another seed.

"""
    return (
        head + "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *map(cells_of, rows)]) + "\n"
    )


def cells_of(row: dict[str, Any]) -> str:
    """Return the line of one selection."""
    oracle, options = row["scores"]["oracle"], row["options"]
    cells = [
        row["selection"],
        f"`{options}`" if options else "",
        f"{row['pairs']:,}",
        f"{row['flipped_share']:.1%}",
        f"{oracle['aligned']:.3f}",
        gain_of(oracle),
        f"{oracle['win_rate']:.3f} ({oracle['low']:.3f} to {oracle['high']:.3f})",
    ]
    return "| " + " | ".join(cells) + " |"
