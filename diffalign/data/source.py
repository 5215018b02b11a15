"""What every reader of preferences offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.data.pairs import Example, Place, RowError
from diffalign.data.rejects import Counts, Rejects, length_error
from diffalign.data.schema import Schema
from diffalign.errors import DataError


class PairSource(ABC):
    """Give access to the usable examples of a data set by index, in file order, best image first, without ties.

    A subclass sets `name`, implements `__len__`, `_fetch` and `_describe`, and calls `_check_usable` when opened.
    Images stay encoded until asked for, so a broken one is met while examples are used, not when the source is opened.
    """

    name: str = ""
    images_per_example: int | None = 2  # None: not known before reading
    has_noises: bool = False  # it says what the images were drawn from
    has_preference: bool | None = False  # some pairs carry a soft label; None: not known before reading
    window: int | None = None  # set where only nearby indices are cheap: pass it to PairSampler

    def __init__(self, rejects: Rejects | None = None, schema: Schema | None = None):
        self.rejects = rejects or Rejects()
        if schema is not None:
            self.counts.unit, self.images_per_example = schema.unit, schema.images_per_example
            self.has_noises = schema.noises is not None

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

    def captions(self) -> Iterator[str]:
        """Yield the captions of the examples; some more than once."""
        for row in self.iterate():
            yield from row.prompts

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
