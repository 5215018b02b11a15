"""The pairs a reward model learns from: what was preferred, and where the pictures are."""

from pathlib import Path

from rich.console import Console

from diffalign.data import RowError, open_pairs
from diffalign.data.pairs import ImageRef
from diffalign.errors import DataError
from diffalign.jobs import skipped
from diffalign.jobs.rewards.stored_pictures import Pictures, Stored
from reward_models.pairs import RewardPair


def read_pairs(
    source: str,
    listed: Path,
    skip_broken: bool,
    stored: Pictures | None,
    console: Console | None,
    root: Path | None = None,
) -> list[RewardPair]:
    """Return the pairs of a source, the chosen picture first; ties are dropped by the reader.

    Args:
        source: as `open_pairs` takes it.
        listed: JSONL file of rows that cannot be used.
        skip_broken: leave them out; otherwise they raise RowError.
        stored: keeps pictures that are no files; None: nobody does.
        console: is told of rows that are left out.
        root: images that the pairs name may lie in it too.

    Raises:
        DataError: there is no usable pair, or no pairs.
    """
    how = {"on_error": "skip" if skip_broken else "raise", "error_log": listed if console else None}
    found = open_pairs(source, root=root, **how)
    if found.images_per_example != 2:
        raise DataError(f"{source} holds lists or single images; a reward model learns from pairs.")
    pairs = []
    for row in found:
        try:
            if skip_broken:
                for image in row.images:
                    image.load()
            user = row.extra.get("user_id")
            pairs.append(
                RewardPair(
                    _encoded(row.chosen, stored),
                    _encoded(row.rejected, stored),
                    row.prompt,
                    1.0 if row.preference is None else row.preference,
                    None if user is None else str(user),
                )
            )
        except RowError as error:
            found.rejects.add(error)
    if not pairs:
        raise DataError(f"{source} holds no usable pair: {found.counts}.")
    if console:
        skipped.tell(found.rejects, console)
    return pairs


def _encoded(image: ImageRef, stored: Pictures | None) -> Path | Stored | bytes:
    """Return where a picture is: it is read and decoded when a batch needs it."""
    if image.path is not None:
        return image.path
    return b"" if stored is None else stored.add(image.content)
