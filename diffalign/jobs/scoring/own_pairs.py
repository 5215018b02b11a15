"""Preference pairs of any source as tasks for people: do they agree with the labels?"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from rich.console import Console

from diffalign.data import RowError, open_pairs
from diffalign.data.pairs import ImageRef
from diffalign.errors import DataError
from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs import skipped
from diffalign.labelling import Task
from diffalign.progress import progress_bar
from reward_models.pictures import format_of

NAMES = ("chosen", "rejected")


def tasks_of(
    source: str, folder: Path, split: str, limit: int | None, console: Console, root: Path | None = None
) -> list[Task]:
    """Return a task for every usable pair; its pictures are copied into `folder`, so that only pictures are served.

    Args:
        source: what `open_pairs` opens.
        folder: for the pictures, and for the list of unusable rows.
        split: of the pairs.
        limit: use the first so many.
        console: where to tell.
        root: images that the pairs name may lie in it too.
    """
    how = {"on_error": "skip", "error_log": folder / skipped.FILE, "root": root}
    pairs = open_pairs(source, split=split, max_samples=limit, **how)
    if pairs.images_per_example not in (2, None):
        raise DataError(f"{source} holds lists or single images; only pairs can be labelled.")
    tasks: list[Task] = []
    numbers: dict[str, tuple[int, Iterator[int]]] = {}
    with progress_bar(len(pairs), "Reading pairs", True) as advance:
        for row in pairs:
            advance(1)
            try:
                files = [str(_kept(image, folder).resolve()) for image in row.images]
            except RowError as error:
                pairs.rejects.add(error)
                continue
            number, repeats = numbers.setdefault(row.prompts[0], (len(numbers), count()))
            tasks.append(Task(number, row.prompts[0], next(repeats), NAMES[0], files[0], NAMES[1], files[1]))
    skipped.tell(pairs.rejects, console)
    if not tasks:
        raise DataError(f"{source} holds no pair of which both images are whole: {pairs.counts}.")
    return tasks


def _kept(image: ImageRef, folder: Path) -> Path:
    """Copy a picture that can be decoded, named by its content; raise RowError for another."""
    content = image.decodable
    file = folder / f"{image.identity}.{format_of(content).lower()}"
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
    return file
