"""`diffalign.score`."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from diffalign.api.common import PathLike, Scorers, kept_in, listed, telling
from diffalign.api.drawing import Pictures
from diffalign.errors import UserError
from diffalign.evaluation import score_table
from diffalign.jobs.drawing import pictures
from diffalign.jobs.drawing.prompts import is_prompt_file, read_prompts
from diffalign.jobs.scoring import score as job
from diffalign.jobs.scoring import scorers as judges
from diffalign.jobs.scoring import tables
from diffalign.jobs.scoring.run import LISTED, broken_file
from diffalign.jobs.scoring.shares import Share
from diffalign.text_files import read_lines, well_formed

Images = PathLike | Sequence[PathLike] | Sequence[Image.Image]


def score(
    images: Images | None = None,
    prompts: PathLike | Sequence[str] | None = None,
    scorers: Scorers = (),
    *,
    pairs: PathLike | None = None,
    out: PathLike | None = None,
    split: str = "train",
    limit: int | None = None,
    tie_rule: str = "half",
    tie_threshold: float = 0.0,
    image_column: str | None = None,
    caption_column: str | None = None,
    root: PathLike | None = None,
    strict: bool = False,
    fresh: bool = False,
    workers: int | None = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> pd.DataFrame:
    """Score pictures for their prompts, or preference pairs; return one row a picture (or pair) and scorer.

    Args:
        images: pictures, as `generate` returned them or of PIL; or files, folders, globs, tar shards, tables.
        prompts: one a picture, one text for all, or a file with one a picture; None where pictures know theirs: those
            of `generate` and its folders, tables and shards with captions.
        scorers: "pickscore,hpsv2.1,oracle" or a list; own weights: "pickscore=assets/tiny-pickscore".
        pairs: score preference pairs instead: parquet, .jsonl, w/ and l/, or a hub data set.
        out: keep the scores in this .parquet, .csv or .jsonl. Of files, folders and pairs OUT.parts keeps what was
            scored: called again, only what is missing is computed. None keeps no files.
        split: of the pairs.
        limit: use only the first so many pairs.
        tie_rule: what equal scores of a pair count as: "half", "wrong", "right", "exclude" or "pickscore".
        tie_threshold: of "pickscore": |P - (1 - P)| up to which a pair is a tie.
        image_column: where tables have the picture, and `caption_column` where they have the prompt.
        root: a folder in which pictures that data names, or links lead to, may lie too.
        strict: stop at the first broken picture instead of leaving broken ones out with a warning.
        fresh: forget what OUT.parts knows.
        workers: processes that decode; by default what the CPUs give.
        batch_size: pictures at a time, or "auto": what fits into memory.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        quiet: say nothing and show no progress.

    Raises:
        UserError: pictures, prompts or scorers that are missing or do not go together.
        reward_models.ScorerError: a scorer gives numbers that are not finite.

    Example:
        scores = diffalign.score("out/dpo", scorers="pickscore=assets/tiny-pickscore")
        scores.groupby("scorer")["score"].mean()
    """
    wanted = listed(scorers)
    options = job.Options(strict=strict, fresh=fresh, workers=workers, batch_size=batch_size, device=device)
    reach = {"root": None if root is None else Path(root)}
    of_pairs = {"split": split, "limit": limit, "rule": job.TieRule(tie_rule, tie_threshold)}
    _check(images, prompts, pairs, of_pairs)
    if pairs is not None:
        run = partial(job.score_pairs, os.fspath(pairs), **of_pairs, **reach)
    elif held := _hold(images, prompts):
        return _score_held(held, wanted, options, out, quiet)
    else:
        places = [images] if isinstance(images, str | os.PathLike) else images
        columns = {"image_column": image_column, "caption_column": caption_column}
        run = partial(job.score_images, list(map(os.fspath, places)), **columns, **reach, **_captions(prompts))
    return _stored(partial(run, wanted=wanted, options=options), out, quiet)


def _check(images: Images | None, prompts: Any, pairs: PathLike | None, of_pairs: dict[str, Any]) -> None:
    """Raise UserError for arguments that contradict each other, or have no effect."""
    if (images is None) == (pairs is None):
        raise UserError(f"Give images, or pairs=SOURCE; got {'neither' if images is None else 'both'}.")
    if images is not None and not isinstance(images, str | os.PathLike) and not len(images):
        raise UserError("There is no picture to score: the list is empty.")
    if pairs is not None and prompts is not None:
        raise UserError("Pairs carry their prompts: leave out prompts.")
    if pairs is None and of_pairs != {"split": "train", "limit": None, "rule": job.TieRule()}:
        raise UserError("split, limit, tie_rule and tie_threshold belong to pairs: leave them out.")


def _captions(prompts: PathLike | None) -> dict[str, Any]:
    """Return the arguments of `score_images` for what says what files show."""
    if prompts is None:
        return {}
    return {"prompts_file": Path(prompts)} if is_prompt_file(prompts) else {"prompt": prompts}


@dataclass(frozen=True)
class _Held:
    """Hold pictures, or files of them in the order in which the caller names them, with a prompt each."""

    images: list[Any]
    prompts: list[str]
    columns: dict[str, Any] = field(default_factory=dict)


def _hold(images: Images, prompts: PathLike | Sequence[str] | None) -> _Held | None:
    """Return pictures in memory, or files whose prompts are in memory; None for all else."""
    if isinstance(images, Pictures):
        columns = {"seed": images.seeds} | ({"model": str(images.folder)} if images.folder else {})
        return _Held(images.images, _one_each(prompts, len(images)) or images.prompts, columns)
    named = isinstance(images, str | os.PathLike)
    if not named and all(isinstance(image, Image.Image) for image in images):
        return _Held(list(images), _one_each(prompts, len(images)) or [])
    if prompts is None or isinstance(prompts, str | os.PathLike):
        return None
    files = pictures.find([os.fspath(images)]) if named else list(images)
    return _Held(files, list(map(well_formed, prompts)), {"file": list(map(str, files))})


def _one_each(prompts: PathLike | Sequence[str] | None, count: int) -> list[str] | None:
    if prompts is None:
        return None
    if not isinstance(prompts, str | os.PathLike):
        return list(map(well_formed, prompts))
    return read_prompts(prompts) if is_prompt_file(prompts) else [prompts] * count


def _score_held(
    held: _Held, wanted: list[str], options: job.Options, out: PathLike | None, quiet: bool
) -> pd.DataFrame:
    """Return the scores of pictures in memory."""
    if out is not None:
        tables.check_suffix(Path(out))
    if not held.prompts and any(map(judges.reads_prompt, judges.parse(wanted))):
        raise UserError("These pictures do not say what they show: give prompts, one a picture or one text for all.")
    size = {} if options.batch_size == "auto" else {"batch_size": options.batch_size}
    with telling(quiet):
        prompts = held.prompts or [""] * len(held.images)
        loaded = judges.load(wanted, options.device)
        scores = score_table(held.images, prompts, loaded, progress=True, **size, **held.columns)
    if out is not None:
        tables.write(scores, Path(out))
    return scores


def _stored(run: Callable[..., pd.DataFrame], out: PathLike | None, quiet: bool) -> pd.DataFrame:
    """Return the scores of a job that keeps them in a file, and that file only if it was asked for."""
    if Share.of(None).count > 1:
        raise UserError(
            "Several processes share pictures by `accelerate launch -m diffalign score`, not by a function."
        )
    with kept_in(out) as place, telling(quiet, messages=out is not None) as console:
        file = place if out is not None else place / "scores.parquet"
        scores = run(out=file, console=console)
        if out is None and broken_file(file).is_file():
            lines = read_lines(broken_file(file))
            shown = "".join(f"\n  {line}" for line in lines[:LISTED])
            warnings.warn(f"{len(lines)} pictures cannot be scored and are left out:{shown}", stacklevel=3)
    return scores
