"""How Python says what a command line says in words: models, seeds, scorers, and where things are kept."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rich
from rich.console import Console

PathLike = str | os.PathLike[str]
Seeds = str | int | Iterable[int]  # "0-3", 0 or [0, 1, 2, 3]
Scorers = str | Iterable[str]  # "oracle,pickscore=assets/tiny-pickscore" or its parts


def worded(seeds: Seeds) -> str:
    """Return seeds as `prompts.parse_seeds` reads them."""
    if isinstance(seeds, str):
        return seeds
    return ",".join(map(str, [seeds] if isinstance(seeds, int) else seeds))


def listed(names: Scorers) -> list[str]:
    """Return the parts of what may be one text or several."""
    return [names] if isinstance(names, str) else list(names)


@contextmanager
def telling(quiet: bool, messages: bool = True) -> Iterator[Console]:
    """Yield where to tell what is done: this terminal or notebook, or nowhere, without `quiet` still with bars."""
    usual = rich.get_console()  # of the bars that are given no other one
    before, usual.quiet = usual.quiet, usual.quiet or quiet
    try:
        yield Console(quiet=quiet or not messages)
    finally:
        usual.quiet = before


@contextmanager
def kept_in(out: PathLike | None) -> Iterator[Path]:
    """Yield the place `out`, or for None a folder that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        yield Path(folder)
