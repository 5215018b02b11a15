"""`diffalign rank`: turn scored pictures into training data, as ranked lists or as best against worst.

The way of Syn-Pic (RankDPO, arXiv 2410.18013): draw every prompt with several models, let several scorers compare the
pictures, and learn from how often each of them wins.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console

from diffalign.data import tables, win_rate_labels
from diffalign.data.schema import noise_text
from diffalign.errors import DataError, suggestion
from diffalign.evaluation.manifest import NOISE, atomic_write
from diffalign.jobs import skipped
from diffalign.jobs.scoring.tables import write_rows
from reward_models.pictures import PictureError, whole

NEEDED = ("file", "prompt", "scorer", "score")


@dataclass(frozen=True)
class Scored:
    """Hold the pictures of one prompt and their scores."""

    prompt: str
    files: list[str]
    scores: np.ndarray  # [k,n], pictures by scorers
    noises: list[str] | None = None  # [k], what the pictures were drawn from, where the table says it of all


def rank(
    table: Path, out: Path, layout: Literal["lists", "pairs"], k: int | None, min_gap: float, console: Console
) -> int:
    """Write training data from a table of `diffalign score` and return the number of rows.

    Args:
        table: a parquet, .csv or .jsonl with file, prompt, scorer and score.
        layout: "lists": all pictures of a prompt with all scores, for RankDPO; "pairs": the one that wins most
            comparisons against the one that wins fewest, for everything that learns from pairs.
        k: pictures a list, None for as many as all prompts have. Prompts with fewer are left out.
        min_gap: of the win rates of best and worst; pairs below it, and equal ones, are left out.

    What the pictures were drawn from goes along if the table says it of all of them: noise_0 and noise_1, or noises.

    Raises:
        DataError: a table without these columns, pictures that are gone, prompts with different numbers of pictures.
    """
    if out.suffix != ".parquet":
        raise DataError(f'Training data is written as parquet, got "{out}". Give a name that ends in .parquet.')
    groups = list(_groups(_read(table)))
    if layout == "lists":
        kept, dropped = _of_length(groups, k, table)
        rows: Iterator[dict[str, Any]] = map(_list_row, kept)
    else:
        dropped = {group.prompt: why for group in groups if (why := _unfit(group, min_gap))}
        rows = map(_pair_row, [group for group in groups if group.prompt not in dropped])
    count = write_rows(rows, out, "No prompt is left: each needs two pictures that the scorers tell apart.")
    console.print(f"{count} {layout} in {out}; {len(dropped)} prompts left out.", markup=False, highlight=False)
    _list_dropped(dropped, len(groups), out.with_name(f"{out.stem}.{skipped.FILE}"), console)
    return count


def _read(file: Path) -> pd.DataFrame:
    if not tables.is_table(file):
        raise DataError(f'Cannot read scores from "{file}": expected a name ending in {", ".join(tables.KINDS)}.')
    try:
        table = tables.read_columns(file, numbers=("score",))
    except DataError as error:
        raise DataError(f"{error} Write it with diffalign score FOLDER --out {file}.") from error
    for name in NEEDED:
        if name not in table.columns:
            hint = suggestion(name, table.columns)
            raise DataError(
                f'{file} has no column "{name}".{hint} It must come from diffalign score on pictures, and has '
                f"{', '.join(table.columns)}."
            )
    return table


def _groups(table: pd.DataFrame) -> Iterator[Scored]:
    """Yield the pictures of every prompt, in the order of the table."""
    drawn_from = None
    if NOISE in table.columns and table[NOISE].map(noise_text).notna().all():
        drawn_from = dict(zip(table["file"], table[NOISE], strict=True))
    for prompt, part in table.groupby("prompt", sort=False):
        wide = part.pivot_table(index="file", columns="scorer", values="score", sort=False)
        if wide.isna().any(axis=None):
            file = wide.index[wide.isna().any(axis=1)][0]
            raise DataError(
                f"{file} lacks the score of one scorer. Score all pictures with all scorers in one command."
            )
        noises = None if drawn_from is None else [drawn_from[file] for file in wide.index]
        yield Scored(str(prompt), [str(file) for file in wide.index], wide.to_numpy(dtype=np.float64), noises)


def _list_dropped(dropped: dict[str, str], prompts: int, file: Path, console: Console) -> None:
    """Write which prompts were left out and why, and say so."""
    if not dropped:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as temporary:
        lines = (json.dumps({"prompt": prompt, "reason": why}) + "\n" for prompt, why in dropped.items())
        temporary.write_text("".join(lines), encoding="utf-8")
    skipped.say(skipped.told(Counter(dropped.values()), prompts, file, "prompts"), console)


def _unfit(group: Scored, min_gap: float) -> str | None:
    """Return why a prompt gives no pair."""
    if len(group.files) < 2:
        return "with one picture only"
    gap = _gap(group)
    return "whose pictures the scorers do not tell apart" if gap <= 0 or gap < min_gap else None


def _of_length(groups: list[Scored], k: int | None, table: Path) -> tuple[list[Scored], dict[str, str]]:
    lengths = sorted({len(group.files) for group in groups})
    if k is None and len(lengths) > 1:
        raise DataError(
            f"The prompts of {table} have {lengths[0]} to {lengths[-1]} pictures. Say how many a list has with --k; "
            "prompts with fewer are left out."
        )
    k = k or lengths[0]
    if k < 2 or k > lengths[-1]:
        raise DataError(f"A list needs 2 to {lengths[-1]} pictures, the most a prompt of {table} has; got {k}.")
    kept = [Scored(g.prompt, g.files[:k], g.scores[:k], g.noises and g.noises[:k]) for g in groups if len(g.files) >= k]
    return kept, {g.prompt: f"with fewer than {k} pictures" for g in groups if len(g.files) < k}


def _gap(group: Scored) -> float:
    rates = win_rate_labels(group.scores)
    return float(rates.max() - rates.min())


def _list_row(group: Scored) -> dict[str, Any]:
    row = {"caption": group.prompt, "images": [_bytes(file) for file in group.files], "scores": group.scores.tolist()}
    return row if group.noises is None else row | {"noises": group.noises}


def _pair_row(group: Scored) -> dict[str, Any]:
    rates = win_rate_labels(group.scores)
    best, worst = int(rates.argmax()), int(rates.argmin())
    row = {
        "caption": group.prompt,
        "jpg_0": _bytes(group.files[best]),
        "jpg_1": _bytes(group.files[worst]),
        "label_0": 1.0,
        "label_1": 0.0,
        "win_rate_0": float(rates[best]),
        "win_rate_1": float(rates[worst]),
    }
    return row if group.noises is None else row | {"noise_0": group.noises[best], "noise_1": group.noises[worst]}


def _bytes(file: str) -> bytes:
    try:
        return whole(file)
    except (OSError, PictureError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read the picture {file} ({why}). Run this where the pictures were scored.") from error
