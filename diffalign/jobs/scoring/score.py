"""`diffalign score`: numbers for pictures, and for pairs how often the scorer agrees with people."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from diffalign.data import PairSource, open_pairs
from diffalign.errors import DataError
from diffalign.jobs import skipped
from diffalign.jobs.scoring import pairs as paired
from diffalign.jobs.scoring import scorers, tables
from diffalign.jobs.scoring.engine import Judge, scan
from diffalign.jobs.scoring.items import PictureSource
from diffalign.jobs.scoring.pairs import PairImages, TieRule, agreement
from diffalign.jobs.scoring.places import open_places
from diffalign.jobs.scoring.run import Options, Outcome, load_judges, parts_folder, run
from diffalign.jobs.scoring.shares import Index
from diffalign.jobs.scoring.store import Known
from diffalign.progress import progress_bar

__all__ = [
    "Options",
    "TieRule",
    "agreement",
    "score_images",
    "score_pairs",
    "score_pictures",
    "score_source",
]
FIRST = ["file", "prompt_id", "prompt", "seed", "model"]


def score_images(
    places: Sequence[str],
    out: Path,
    wanted: Sequence[str],
    options: Options | None = None,
    *,
    prompts_file: Path | None = None,
    prompt: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    root: Path | None = None,
    console: Console,
) -> pd.DataFrame | None:
    """Score pictures; write and return one row a picture and scorer, or None while other processes are at work.

    Columns: file, prompt_id, prompt, seed, model, image (hash), scorer, weights (hash), preprocessing, score.

    Args:
        places: files, folders, globs, tar shards, parquet files, JSON lines (see `open_places`).
        out: .parquet, .csv or .jsonl; OUT.parts keeps what was scored, STEM.broken.jsonl lists broken pictures.
        wanted: scorers, as `scorers.parse` reads them.
        options: how to score.
        prompts_file: one prompt a picture.
        prompt: one for all.
        image_column: of parquet and JSON lines.
        caption_column: likewise.
        root: pictures that data names, or links lead to, may lie in it too.
        console: where to tell.

    Raises:
        DataError: no pictures, no prompts, or with `options.strict` a broken picture.
    """
    tables.check_suffix(out)
    reads = any(map(scorers.reads_prompt, scorers.parse(wanted)))
    columns = {"image_column": image_column, "caption_column": caption_column, "root": root}
    source = open_places(places, prompts_file=prompts_file, prompt=prompt, with_prompts=reads, **columns)
    if prompts_file is not None:
        rows = source.table()
        first, last = rows.iloc[0], rows.iloc[-1]
        console.print(f"{first.file}: {first.prompt!r} ... {last.file}: {last.prompt!r}", markup=False, highlight=False)
    options = options or Options()
    return score_pictures(source, out, load_judges(wanted, options), options, console)


def score_pictures(
    source: PictureSource, out: Path, judges: list[Judge], options: Options, console: Console
) -> pd.DataFrame | None:
    """Score an opened source with loaded scorers; else as `score_images`."""
    outcome = run(source, out, judges, options, console)
    if outcome is None:
        return None
    scores = _table(source.table(), outcome)
    tables.write(scores, out)
    _tell_cut(outcome, console)
    console.print(tables.means(scores))
    whole = int(outcome.index.whole.sum())
    console.print(f"{whole} pictures, {outcome.computed} scores computed: {out}", markup=False, highlight=False)
    return scores


def score_pairs(
    source: str,
    out: Path,
    wanted: Sequence[str],
    options: Options | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
    rule: TieRule | None = None,
    root: Path | None = None,
    skip_broken: bool = True,
    console: Console,
    **settings: Any,
) -> pd.DataFrame | None:
    """Score preference pairs; write and return one row per pair and scorer, or None while other processes are at work.

    The columns are those of `pair_table`. STEM.accuracy.csv and STEM.calibration.csv say how far the scorers agree
    with people.

    Args:
        source: what `open_pairs` opens.
        out: .parquet, .csv or .jsonl.
        wanted: scorers, as `scorers.parse` reads them.
        options: how to score; else `settings` are its fields, and OUT.parts goes when OUT is written.
        split: of the pairs.
        limit: use the first so many.
        rule: what ties count as in the accuracy.
        root: images that the pairs name may lie in it too.
        skip_broken: leave out broken pairs; otherwise stop at the first.
        console: where to tell.
        settings: fields of Options.

    Raises:
        DataError: no pairs, or broken ones that are not to be skipped.
    """
    tables.check_suffix(out)
    scorers.parse(wanted)
    options = options or Options(strict=not skip_broken, keep=False, **settings)
    how = {"on_error": "raise" if options.strict else "skip", "error_log": out.with_name(f"{out.stem}.{skipped.FILE}")}
    with skipped.skippable():
        rows = open_pairs(source, split=split, max_samples=limit, root=root, **how)
        outcome = run(PairImages(rows), out, load_judges(wanted, options), options, console)
    if outcome is None:
        return None
    scores = _pair_tables(outcome)
    if scores.empty:
        raise DataError(f"{source} holds no pair of which both images are whole: {rows.counts}.")
    _write_agreement(scores, out, rule or TieRule(), console)
    if not options.keep:
        shutil.rmtree(parts_folder(out))
    _tell_cut(outcome, console)
    skipped.tell(rows.rejects, console)
    broken = len(rows) - len(scores) // len(outcome.judges)
    left_out = f", {broken} left out for broken images" if broken else ""
    console.print(f"{source}: {rows.counts}{left_out}. Scores: {out}", markup=False, highlight=False)
    return scores


def score_source(source: PairSource, judges: Sequence[Any], batch_size: int = 32) -> pd.DataFrame:
    """Return one row per pair and scorer, as `pair_table`, and store nothing. Broken rows go to the source's rejects.

    Raises:
        DataError: none is readable, or RowError for the first broken one unless they may be skipped.
    """
    images, wrapped = PairImages(source), [Judge.of(judge) for judge in judges]
    nothing = [Known(np.empty(0, "S32"), np.empty(0, np.float32)) for _ in judges]
    items, keys, values = [], [], [[] for _ in judges]
    with progress_bar(len(images), "Scoring pairs", True) as advance:
        for scored in scan(images.items(0, len(images)), wrapped, nothing, chunk=2 * batch_size):
            prepared = scored.prepared
            for row in sorted(prepared.faults):
                source.rejects.add(images.fault(prepared.items[row].position, prepared.faults[row]))
            for column, (rows, found) in zip(values, scored.scores, strict=True):
                column.append(np.full(len(prepared.items), np.nan))
                column[-1][rows] = found
            items += prepared.items
            keys.append(prepared.keys)
            advance(len(prepared.items))
    captions = [item.caption or "" for item in items]
    index = Index(0, np.concatenate(keys), [item.name for item in items], captions, [""] * len(items))
    parts = [paired.pair_table(index, j, np.concatenate(v)) for j, v in zip(wrapped, values, strict=True)]
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise DataError(f"{source.name} holds no readable pair: {source.counts}.")
    return table


def _pair_tables(outcome: Outcome) -> pd.DataFrame:
    """Return one row per whole pair and scorer."""
    parts = [paired.pair_table(outcome.index, judge, outcome.scores(j)) for j, judge in enumerate(outcome.judges)]
    return pd.concat(parts, ignore_index=True)


def _table(rows: pd.DataFrame, outcome: Outcome) -> pd.DataFrame:
    """Return one row per whole picture and scorer."""
    whole = outcome.index.whole
    rows = rows[[*FIRST, *(name for name in rows.columns if name not in FIRST)]]
    pictures = rows.assign(image=outcome.index.images())[whole]
    parts = []
    for number, judge in enumerate(outcome.judges):
        identity = judge.identity._asdict()
        parts.append(pictures.assign(**identity, score=outcome.scores(number)[whole]))
    return pd.concat(parts, ignore_index=True)


def _write_agreement(scores: pd.DataFrame, out: Path, rule: TieRule, console: Console) -> None:
    tables.write(scores, out)
    tables.write(paired.summary(scores, rule), out.with_name(f"{out.stem}.accuracy.csv"))
    bins = paired.calibration(scores)
    tables.write(bins, out.with_name(f"{out.stem}.calibration.csv"))
    console.print(agreement(scores, rule))
    if len(bins):
        console.print(paired.reliability_table(bins))


def _tell_cut(outcome: Outcome, console: Console) -> None:
    """Say how many prompts were longer than a scorer reads."""
    for judge in outcome.judges:
        if cut := getattr(judge.scorer, "cut_prompts", None):
            longest = max(cut.values())
            console.print(
                f"{judge.identity.scorer} reads {judge.scorer.text_length} tokens: {len(cut)} prompts were "
                f"cut, the longest has {longest}.",
                highlight=False,
            )
