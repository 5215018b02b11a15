"""Ratings of prompts: 0 to 10 for clear, concrete, visual prompts, 0 for harmful ones.

They come from a file, from any function, or from a local language model (language_model.py). Every distinct prompt is
rated once; with a cache, once ever.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from diffalign.errors import DataError
from diffalign.filtering.files import read_table
from diffalign.text_files import read_lines, well_formed

HARMFUL, UNPARSED, MISSING = "harmful", "unparsed", "missing"
FALLBACK = 5.0  # the rating where there is none: the middle of the scale


class Rating(NamedTuple):
    """Hold the rating of a prompt, and in `flag` what was special: harmful, unparsed, missing or nothing."""

    score: float
    flag: str = ""
    answer: str = ""  # what the language model said


Rater = Callable[[Sequence[str]], Sequence[Rating | float]]


def rate(
    prompts: Sequence[str],
    rater: Rater,
    *,
    cache: Path | None = None,
    asked: str = "",
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Rating]:
    """Rate every distinct prompt with a function and return the ratings by prompt.

    Args:
        prompts: the prompts.
        rater: takes some prompts and returns as many ratings or plain numbers.
        cache: JSONL file that remembers ratings, written batch by batch: an interrupted run goes on where it stopped.
        asked: who was asked what; ratings in the cache by another are not used.
        batch_size: prompts a call. They are passed in order of length, so that a batch wastes little padding.
        advance: told how many prompts are done.

    Raises:
        DataError: a rating that is no finite number, or not as many ratings as prompts.
    """
    wanted = dict.fromkeys(prompts)
    known = {prompt: rating for prompt, rating in _recall(cache, asked).items() if prompt in wanted}
    advance(len(known))
    todo = sorted((prompt for prompt in wanted if prompt not in known), key=lambda prompt: (len(prompt), prompt))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        ratings = _checked(batch, rater(batch))
        _remember(cache, asked, ratings)
        known.update(ratings)
        advance(len(batch))
    return {prompt: known[prompt] for prompt in wanted}


def read_qualities(path: str | Path, prompts: Sequence[str], fallback: float = FALLBACK) -> dict[str, Rating]:
    """Return the ratings that a file gives to prompts; prompts it lacks get `fallback` and the flag "missing".

    Args:
        path: parquet, csv or jsonl with the columns prompt, score and, if you like, harmful (true or false).
        prompts: the prompts wanted.
        fallback: the rating of prompts that are not in the file.

    Raises:
        DataError: unreadable, a prompt with two ratings, ratings that are no numbers, or none of the prompts in it.
    """
    table = read_table(path, ("prompt", "score"), "ratings of prompts (columns prompt, score[, harmful])")
    scores = pd.to_numeric(table["score"], errors="coerce")
    if scores.isna().any():
        row = int(scores.isna().to_numpy().argmax())
        raise DataError(f"{path}, row {row}: the score is {table['score'].iloc[row]!r}, expected a number.")
    harmful = table["harmful"].map(_is_true) if "harmful" in table else [False] * len(table)
    found: dict[str, Rating] = {}
    for prompt, score, bad in zip(map(str, table["prompt"]), scores, harmful, strict=True):
        rating = Rating(float(score), HARMFUL if bad else "")
        prompt = well_formed(prompt)
        if found.setdefault(prompt, rating) != rating:
            raise DataError(
                f"{path} rates {prompt!r} both {found[prompt].score:g} and {score:g}. Keep one rating a prompt."
            )
    wanted = dict.fromkeys(prompts)
    if not any(prompt in found for prompt in wanted):
        raise DataError(f"{path} rates none of the {len(wanted)} prompts, e.g. not {next(iter(wanted))!r}.")
    return {prompt: found.get(prompt, Rating(fallback, MISSING)) for prompt in wanted}


def _is_true(value: object) -> bool:
    """Return what a cell says, of a CSV too: there it is text."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else value == 1


def _checked(prompts: Sequence[str], ratings: Sequence[Rating | float]) -> Mapping[str, Rating]:
    if len(ratings) != len(prompts):
        raise DataError(f"The text quality function returned {len(ratings)} ratings for {len(prompts)} prompts.")
    plain = [rating if isinstance(rating, Rating) else Rating(float(rating)) for rating in ratings]
    for prompt, rating in zip(prompts, plain, strict=True):
        if not math.isfinite(rating.score):
            raise DataError(f"The text quality of {prompt!r} is {rating.score}, expected a finite number.")
    return dict(zip(prompts, plain, strict=True))


def _recall(cache: Path | None, asked: str) -> dict[str, Rating]:
    """Read a cache; a last line cut off by a crash is no rating."""
    found: dict[str, Rating] = {}
    if cache is None or not cache.exists():
        return found
    for line in read_lines(cache):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["asked"] == asked:
            found[record["prompt"]] = Rating(record["score"], record["flag"], record["answer"])
    return found


def _remember(cache: Path | None, asked: str, ratings: Mapping[str, Rating]) -> None:
    if cache is None:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"asked": asked, "prompt": prompt, **rating._asdict()}) for prompt, rating in ratings.items()]
    with open(cache, "a+b") as file:
        # a line that a crash cut off must not swallow the next one
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            lines = lines if file.read(1) == b"\n" else ["", *lines]
        file.write(("\n".join(lines) + "\n").encode())
