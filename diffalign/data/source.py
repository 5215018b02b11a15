"""What every reader of preferences offers, and how unusable rows are accounted for."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.data.pairs import Example, Place, RowError
from diffalign.errors import DataError

if TYPE_CHECKING:
    from diffalign.data.schema import Schema


@dataclass
class Counts:
    """Count rows as the reader meets them."""

    unit: str = "pairs"  # what a usable row is called: pairs, lists or images
    rows: int = 0  # rows read
    pairs: int = 0  # usable rows, as far as can be told without decoding images
    ties: int = 0  # rows without a winner: dropped
    unlabelled: int = 0  # rows without a label: dropped
    skipped: dict[str, int] = field(default_factory=dict)  # unusable rows by reason, with on_error="skip"

    def __str__(self) -> str:
        parts = [f"{self.rows} rows", f"{self.pairs} {self.unit}", f"{self.ties} ties dropped"]
        if self.unlabelled:
            parts.append(f"{self.unlabelled} unlabelled rows dropped")
        parts += [f"{number} skipped ({reason})" for reason, number in sorted(self.skipped.items())]
        return ", ".join(parts)


class Rejects:
    """Decide what happens to an unusable row: raise, or count it and list it in a JSONL file.

    Args:
        on_error: "raise" or "skip".
        error_log: JSONL file {"file", "row", "reason", "detail"}; written anew, and only if there is something to list.
    """

    def __init__(self, on_error: str = "raise", error_log: str | Path | None = None):
        if on_error not in ("raise", "skip"):
            raise DataError(f'on_error must be "raise" or "skip", got "{on_error}".')
        self.on_error, self.error_log = on_error, Path(error_log) if error_log else None
        self.counts = Counts()
        self.listed: list[RowError] = []
        self._places: set[Place] = set()

    def add(self, error: RowError) -> None:
        """Raise `error`, or record it once if bad rows may be skipped."""
        if self.on_error == "raise":
            raise error
        if error.place in self._places:
            return
        self._places.add(error.place)
        self.listed.append(error)
        self.counts.skipped[error.reason] = self.counts.skipped.get(error.reason, 0) + 1
        if self.error_log is not None:
            self.error_log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.error_log, "w" if len(self.listed) == 1 else "a", encoding="utf-8") as file:
                file.write(json.dumps(as_record(error)) + "\n")


def as_record(error: RowError) -> dict[str, Any]:
    """Return the line that stands for `error` in an error log."""
    return {**error.place._asdict(), "reason": error.reason, "detail": error.detail}


def from_record(record: dict[str, Any]) -> RowError:
    """Return the error a line of an error log stands for."""
    return RowError(Place(record["file"], record["row"], record["unit"]), record["reason"], record["detail"])


def length_error(place: Place, found: int, expected: int) -> RowError:
    """Return the error of a list that is longer or shorter than the first."""
    detail = f"the list has {found} images, but the first of this data set has {expected}; all must have as many"
    return RowError(place, "list length", detail)


class PairSource(ABC):
    """Give access to the usable examples of a data set by index, in file order, best image first, without ties.

    A subclass sets `name`, implements `__len__`, `_fetch` and `_describe`, and calls `_check_usable` when opened.
    Images stay encoded until asked for, so a broken one is met while examples are used, not when the source is opened.
    """

    name: str = ""
    images_per_example: int | None = 2  # None: not known before reading
    has_preference: bool | None = False  # some pairs carry a soft label; None: not known before reading
    window: int | None = None  # set where only nearby indices are cheap: pass it to PairSampler

    def __init__(self, rejects: Rejects | None = None, schema: "Schema | None" = None):
        self.rejects = rejects or Rejects()
        if schema is not None:
            self.counts.unit, self.images_per_example = schema.unit, schema.images_per_example

    @property
    def counts(self) -> Counts:
        """Return the counts so far; `skipped` grows when broken images are met."""
        return self.rejects.counts

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _fetch(self, index: int) -> Example:
        """Return pair `index`; raise RowError when it cannot be read."""

    @abstractmethod
    def _describe(self, memo: Path | None) -> dict[str, Any]:
        """Return what the content depends on, JSON-serialisable; `memo` may remember file hashes."""

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._fetch(int(index))

    def __iter__(self) -> Iterator[Example]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Example]:
        """Yield the pairs from `start` on; unreadable rows raise or are skipped, as `on_error` says."""
        for index in range(start, len(self)):
            try:
                row = self._fetch(index)
            except RowError as error:
                self.rejects.add(error)
            else:
                yield row

    def rows(self, indices: Sequence[int]) -> list[Example]:
        """Return several pairs in the order asked for; they are read in file order, each stretch of a file once."""
        read = {index: self[index] for index in sorted(set(indices))}
        return [read[index] for index in indices]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Describe the content: files, sizes, content hashes, columns, number of pairs. Reads every file once."""
        return self.identify()

    def identify(self, memo: Path | None = None) -> dict[str, Any]:
        """Return `identity`, with an SQLite file that spares untouched files from being read again."""
        if "identity" not in self.__dict__:
            self.__dict__["identity"] = self._describe(memo)
        return self.__dict__["identity"]

    def fitting(self, row: Example | int, place: Place) -> Example | int:
        """Return what was read; the first list says how many images all have. Raises RowError for another number."""
        if isinstance(row, Example):
            self.images_per_example = self.images_per_example or len(row.images)
            if len(row.images) != self.images_per_example:
                raise length_error(place, len(row.images), self.images_per_example)
        return row

    def _check_usable(self) -> None:
        counts = self.counts
        if counts.pairs:
            return
        why = "all of them are ties" if counts.rows and counts.ties == counts.rows else str(counts)
        unit = counts.unit.removesuffix("s")
        raise DataError(f"{self.name} holds no usable {unit}: {counts.rows} rows, {why}.")
