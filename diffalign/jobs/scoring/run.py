"""One run over a source: this process's share is scored, and whoever finishes last has the scores of all."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from diffalign.errors import DataError, UserError
from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs.scoring import scorers
from diffalign.jobs.scoring.engine import CHUNK, CHUNK_ON_GPU, Judge, helpers_alive, pick_workers, scan
from diffalign.jobs.scoring.items import Source
from diffalign.jobs.scoring.shares import Index, Share, read_indices, request_id, write_index
from diffalign.jobs.scoring.store import Known, Store
from diffalign.progress import Progress

LISTED = 5  # broken pictures in a message


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say how to score; nothing here changes a score but by rounding."""

    batch_size: int | str = "auto"  # pictures at a time, or "auto": what fits into memory
    workers: int | None = None  # processes that decode; None: as many as the CPUs give
    device: str = "auto"
    strict: bool = False  # stop at the first broken picture
    fresh: bool = False  # forget what was scored before
    shard: str | None = None  # "2/4": this machine's part
    keep: bool = True  # OUT.parts once OUT is written, for the next run

    def __post_init__(self):
        size = self.batch_size
        if size != "auto" and (not isinstance(size, int) or size < 1):
            raise UserError(f'--batch-size must be at least 1, or "auto", got {size}.')
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be 0 or more, got {self.workers}.")


@dataclass(frozen=True)
class Outcome:
    """Hold what all shares together found."""

    index: Index
    judges: list[Judge]
    known: list[Known]  # by judge
    computed: int  # scores that this process computed

    def scores(self, judge: int) -> np.ndarray:
        """Return the scores [N] float64 of a judge; NaN where the picture is broken."""
        return np.where(self.index.whole, self.known[judge].of(self.index.keys), np.nan)


def load_judges(wanted: Sequence[str], options: Options) -> list[Judge]:
    """Load the scorers of a command line onto this process's device."""
    device, local = options.device, int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    names, loaded, sources = scorers.parse(wanted), scorers.load(wanted, device), scorers.sources(wanted)
    judges = [Judge.of(scorer, sources.get(name)) for name, scorer in zip(names, loaded, strict=True)]
    for judge in judges:
        if judge.recipe is not None:
            judge.scorer.set_batch_size(options.batch_size)
    return judges


def run(source: Source, out: Path, judges: list[Judge], options: Options, console: Console) -> Outcome | None:
    """Score this process's share; return what all shares found, or None while others are still at work.

    What is scored is kept in the folder OUT.parts, by content: a run that was killed, or asked for another scorer,
    computes only what is not there.

    Raises:
        DataError: a broken picture with `options.strict`, or nothing but broken ones.
    """
    share, folder = Share.of(options.shard), parts_folder(out)
    if options.fresh and folder.exists():
        if share.count > 1:
            raise UserError(f"With several processes, delete {folder} yourself instead of --fresh.")
        shutil.rmtree(folder)
    store, request = Store(folder), request_id(source, share.count)
    identities = [judge.identity for judge in judges]
    try:
        index, computed = _score_share(source, share, judges, store.known(identities), store, options, console)
    finally:
        store.seal()
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder, request, share, index)
    found = list(read_indices(folder, request, share.count, source))
    known = store.known(identities)
    if len(found) < share.count or not all(part.complete(k) for part in found for k in known):
        console.print(
            f"Part {share.index + 1} of {share.count} is scored; whoever finishes last writes {out}.", markup=False
        )
        return None
    outcome = Outcome(Index.joined(found), judges, known, computed)
    _report_faults(outcome.index, out, console)
    return outcome


def _score_share(
    source: Source,
    share: Share,
    judges: Sequence[Judge],
    known: Sequence[Known],
    store: Store,
    options: Options,
    console: Console,
) -> tuple[Index, int]:
    """Return what is at this share's positions, and how many scores were computed for it."""
    start, stop = share.bounds(source)
    keys, names, captions, faults, computed = [], [], [], [], 0
    workers = pick_workers(options.workers, stop - start, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    items = source.items(start, stop)
    what = f"Scoring, part {share.index + 1} of {share.count}" if share.count > 1 else "Scoring"
    # Only the first has the terminal to itself.
    with Progress(what, stop - start, bar=share.index == 0, console=console) as shown, helpers_alive():
        for scored in scan(items, judges, known, workers=workers, chunk=_chunk(options, judges)):
            prepared = scored.prepared
            for judge, (rows, values) in zip(judges, scored.scores, strict=True):
                if len(rows):
                    store.add(judge.identity, prepared.keys[rows], values)
                    computed += len(rows)
            if options.strict and prepared.faults:
                row = min(prepared.faults)
                raise DataError(
                    f"{prepared.items[row].name}: {prepared.faults[row]}. Repair or remove it, or leave such pictures "
                    "out with --skip-broken."
                )
            keys.append(prepared.keys)
            names += [item.name for item in prepared.items]
            captions += [item.prompt if item.caption is None else item.caption for item in prepared.items]
            faults += [prepared.faults.get(row, "") for row in range(len(prepared.items))]
            shown.advance(len(prepared.items))
    return Index(start, np.concatenate([np.zeros(0, "S32"), *keys]), names, captions, faults), computed


def _chunk(options: Options, judges: Sequence[Judge]) -> int:
    if options.batch_size != "auto":
        return int(options.batch_size)
    on_gpu = any(getattr(judge.scorer, "device", torch.device("cpu")).type == "cuda" for judge in judges)
    return CHUNK_ON_GPU if on_gpu else CHUNK


def parts_folder(out: Path) -> Path:
    """Return where scores are kept by content."""
    return out.with_name(f"{out.name}.parts")


def broken_file(out: Path) -> Path:
    """Return where broken pictures are listed."""
    return out.with_name(f"{out.stem}.broken.jsonl")


def _report_faults(index: Index, out: Path, console: Console) -> None:
    """List broken pictures beside the output; raise DataError if there are no others."""
    faults = [(name, fault) for name, fault in zip(index.names, index.faults, strict=True) if fault]
    file = broken_file(out)
    if not faults:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as temporary:
        lines = [json.dumps({"file": name, "reason": fault}) + "\n" for name, fault in faults]
        temporary.write_text("".join(lines), encoding="utf-8")
    named = "\n".join(f"  {name}: {fault}" for name, fault in faults[:LISTED])
    more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    head = f"{len(faults)} of {len(index.faults)} pictures cannot be scored, listed in {file}:\n{named}{more}"
    if len(faults) == len(index.faults):
        raise DataError(f"{head}\nNothing is left to score.")
    console.print(head, markup=False, highlight=False)
