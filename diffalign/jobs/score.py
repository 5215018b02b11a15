"""`diffalign score`: numbers for pictures, and for pairs how often the scorer agrees with people."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from diffalign.data import PairRow, PairSource, RowError, open_pairs
from diffalign.errors import DataError
from diffalign.evaluation import score_table
from diffalign.evaluation.progress import progress_bar
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.statistics import prompt_wins, wilson_interval
from diffalign.jobs import pictures, tables
from diffalign.jobs import scorers as scoring

LISTED = 5  # broken files in a message
Judged = tuple[PairRow, Image.Image, Image.Image]  # with its chosen and rejected image decoded


def score_images(
    places: Sequence[str],
    out: Path,
    wanted: Sequence[str],
    *,
    prompts_file: Path | None = None,
    prompt: str | None = None,
    skip_broken: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    console: Console,
) -> pd.DataFrame:
    """Score picture files; write and return file, prompt_id, prompt, seed, model, scorer, score.

    Raises:
        DataError: pictures without prompts, or broken ones unless they are to be skipped.
    """
    tables.check_suffix(out)
    scoring.parse(wanted)
    rows = pictures.with_prompts(pictures.find(places), prompts_file, prompt)
    faults = pictures.broken([Path(file) for file in rows["file"]])
    rows = _without(rows, faults, skip_broken, console)
    if prompts_file is not None:
        first, last = rows.iloc[0], rows.iloc[-1]
        console.print(f"{first.file}: {first.prompt!r} ... {last.file}: {last.prompt!r}", markup=False, highlight=False)
    columns = {name: rows[name].tolist() for name in ("prompt_id", "seed", "model", "file")}
    scores = score_table(
        [Path(file) for file in rows["file"]],
        rows["prompt"].tolist(),
        scoring.load(wanted, device),
        batch_size=batch_size,
        progress=True,
        **columns,
    )
    scores = scores[["file", *(name for name in scores.columns if name != "file")]]
    tables.write(scores, out)
    console.print(tables.means(scores))
    console.print(f"{len(rows)} pictures: {out}", markup=False, highlight=False)
    return scores


def score_pairs(
    source: str,
    out: Path,
    wanted: Sequence[str],
    *,
    split: str = "train",
    limit: int | None = None,
    skip_broken: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    console: Console,
) -> pd.DataFrame:
    """Score preference pairs; write and return one row per pair and scorer.

    Columns: example_id, prompt, scorer, score_chosen, score_rejected, probability that the scorer gives to the chosen
    image winning, and agreement with the human label (1, 0, or 0.5 for equal scores).

    Raises:
        DataError: no pairs, or broken ones unless they are to be skipped.
    """
    tables.check_suffix(out)
    scoring.parse(wanted)
    on_error = "skip" if skip_broken else "raise"
    with skippable():
        pairs = open_pairs(source, split=split, max_samples=limit, on_error=on_error)
        scores = score_source(pairs, scoring.load(wanted, device), batch_size)
    tables.write(scores, out)
    console.print(agreement(scores))
    console.print(f"{source}: {pairs.counts}. Scores: {out}", markup=False, highlight=False)
    return scores


def score_source(source: PairSource, judges: Sequence[Any], batch_size: int = 32) -> pd.DataFrame:
    """Return one row per pair and scorer, with the columns of `score_pairs`. Raises DataError if none is readable."""
    if source.images_per_example != 2:
        raise DataError(f"{source.name} holds lists or single images, not pairs. Score the picture files instead.")
    parts = []
    with progress_bar(len(source), "Scoring pairs", True) as advance:
        for batch in _batches(source, batch_size):
            parts += [_judge(judge, batch) for judge in judges]
            advance(len(batch))
    if not parts:
        raise DataError(f"{source.name} holds no readable pair: {source.counts}.")
    return pd.concat(parts, ignore_index=True)


def agreement(scores: pd.DataFrame) -> Table:
    """Return by scorer how often it agrees with the label, with the interval of that, and how sure it is."""
    table = tables.plain("scorer", "pairs", "accuracy", "95 % interval", "ties", "mean P(chosen)")
    for name, part in scores.groupby("scorer", sort=False):
        agrees = part["agreement"]
        low, high = wilson_interval(float(agrees.sum()), len(part))
        cells = [f"{agrees.mean():.3f}", f"{low:.3f} to {high:.3f}", str(int((agrees == 0.5).sum()))]
        table.add_row(str(name), str(len(part)), *cells, format_score(part["probability"].mean()))
    return table


def _without(
    rows: pd.DataFrame, faults: Sequence[pictures.Broken], skip_broken: bool, console: Console
) -> pd.DataFrame:
    """Return the rows whose pictures are whole, listing the others, or raise."""
    if not faults:
        return rows
    named = "\n".join(f"  {fault.file}: {fault.reason}" for fault in faults[:LISTED])
    more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    head = f"{len(faults)} of {len(rows)} pictures cannot be read:\n{named}{more}"
    if not skip_broken:
        raise DataError(f"{head}\nReplace them, or leave them out with --skip-broken.")
    left = rows[~rows["file"].isin([str(fault.file) for fault in faults])]
    if left.empty:
        raise DataError(f"{head}\nNothing is left to score.")
    console.print(f"Skipped: {head}", markup=False, highlight=False)
    return left


@contextmanager
def skippable() -> Iterator[None]:
    """Word an unusable row for the command line."""
    try:
        yield
    except RowError as error:
        place = f"{error.place.file}, {error.place.unit} {error.place.row}"
        raise DataError(
            f"{place}: {error.detail}. Repair or remove it, or leave such rows out with --skip-broken."
        ) from error


def _batches(source: PairSource, size: int) -> Iterator[list[Judged]]:
    """Yield decoded pairs; those that cannot be decoded go to the source's rejects, which raise or count them."""
    batch: list[Judged] = []
    for row in source:
        try:
            batch.append((row, row.chosen.load(), row.rejected.load()))
        except RowError as error:
            source.rejects.add(error)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _judge(judge: Any, batch: Sequence[Judged]) -> pd.DataFrame:
    """Return the rows of one scorer for a batch of pairs."""
    rows, chosen, rejected = map(list, zip(*batch, strict=True))
    prompts = [row.prompt for row in rows]
    scores = judge.score([*chosen, *rejected], prompts * 2).double().numpy()
    won, lost = scores[: len(rows)], scores[len(rows) :]
    wins = prompt_wins(won, lost)
    # The oracle measures: what it says is no matter of probability.
    scale = getattr(judge, "preference_scale", None)
    return pd.DataFrame(
        {
            "example_id": [row.example_id for row in rows],
            "prompt": prompts,
            "scorer": judge.name,
            "score_chosen": won,
            "score_rejected": lost,
            "probability": wins if scale is None else expit(scale * (won - lost)),
            "agreement": wins,
        }
    )
