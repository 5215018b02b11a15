"""What every schema has: the meaning of columns, which rows are usable, and how examples are made of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.pairs import Example, ImageRef, Place, RowError
from diffalign.data.rejects import Counts, Rejects, length_error
from diffalign.errors import DataError, suggestion
from diffalign.pictures import OutsideError, Reach
from diffalign.text_files import MOST_CHARACTERS, caption_fault, possible_name, well_formed

TIE, UNLABELLED, INVALID = -1, -2, -3


@dataclass(frozen=True)
class Schema(ABC):
    """Name the columns of a data set and make examples of its rows."""

    caption: str = "caption"
    noises: tuple[str, ...] | None = None  # columns that say what the images were drawn from, if there are any

    unit: ClassVar[str] = "pairs"
    images_per_example: ClassVar[int | None] = 2  # None: the rows say it
    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = ()  # what `noises` may be
    remedy: ClassVar[str] = ""  # which arguments name the columns
    alternative: ClassVar[str] = ""  # what else a JSON line may hold

    @property
    @abstractmethod
    def image_columns(self) -> tuple[str, ...]:
        """Return the columns that hold images."""

    @property
    @abstractmethod
    def label_columns(self) -> tuple[str, ...]:
        """Return the columns that say how good the images are; the first must be there."""

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Return the columns that hold captions."""
        return (self.caption,)

    @abstractmethod
    def read(self, record: Mapping[str, Any], index: int, place: Place, reach: Reach) -> Example | int:
        """Return the example of a row, or TIE or UNLABELLED; its images are bytes, or files in `reach`.

        Raises:
            RowError: the row is unusable.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the examples depend on beside the data, JSON-serialisable."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def needed(self) -> tuple[str, ...]:
        """Return every column that is used, those that may be absent included."""
        return (*self.image_columns, *self.label_columns, *self.caption_columns, *(self.noises or ()))

    @property
    def required(self) -> tuple[str, ...]:
        """Return the columns that must be there."""
        return (*self.image_columns, *self.label_columns[:1], *self.caption_columns)

    def of_line(self, record: Mapping[str, Any], place: Place) -> "Schema":
        """Return the schema that fits a JSON line, which may call its caption "prompt". Raises RowError if none."""
        schema = self
        if self.caption in self.caption_columns:
            caption = next((name for name in (self.caption, "prompt", "caption") if name in record), None)
            if caption is None:
                raise RowError(place, "missing column", f'no "prompt" or "caption"; it has {", ".join(record)}')
            schema = self._captioned(caption)
        if any(name not in record for name in schema.required):
            wanted = " and ".join(f'"{name}"' for name in schema.required if name != schema.caption)
            detail = f"expected {self.alternative}{wanted}; it has {', '.join(record)}"
            raise RowError(place, "missing column", detail)
        return schema

    def _captioned(self, caption: str) -> Self:
        return self if caption == self.caption else replace(self, caption=caption)

    def extra(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scalar columns that are not used, as they are."""
        needed = self.needed
        return {
            name: well_formed(value) if isinstance(value, str) else value
            for name, value in record.items()
            if name not in needed and isinstance(value, str | int | float | bool)
        }


@dataclass
class Verdicts:
    """Say of n rows what they are, from their light columns alone."""

    outcome: np.ndarray  # [n]: the number of images of a usable row, else TIE, UNLABELLED or INVALID
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)  # of INVALID rows: reason and detail
    soft: bool = False  # some usable row has a preference


class TableSchema(Schema):
    """Judge the rows of a table as well, before any image is read."""

    def require(self, found: Iterable[str], file: str) -> None:
        """Raise DataError unless the required columns are among `found`."""
        found = list(found)
        missing = [name for name in self.required if name not in found]
        if missing:
            words = ", ".join(f'"{name}"' for name in missing)
            hint = suggestion(missing[0], found)
            raise DataError(f"{file} lacks the column(s) {words}.{hint} It has: {', '.join(found)}. {self.remedy}")

    def light(self, found: Iterable[str]) -> list[str]:
        """Return the columns needed to tell which rows are usable: labels and captions, not the images."""
        return [name for name in (*self.label_columns, *self.caption_columns) if name in found]

    @abstractmethod
    def judge(self, table: pa.Table, file: str) -> Verdicts:
        """Judge rows by their `light` columns. Raises DataError for columns of a wrong type."""

    def mark_bad_captions(self, table: pa.Table, verdicts: Verdicts) -> None:
        """Make usable rows without a caption, or with one that is no text, INVALID."""
        for name in self.caption_columns:
            column = table.column(name)
            bad = _maybe_bad(column)
            for row in np.flatnonzero(bad & (verdicts.outcome >= 0)).tolist():
                if fault := cell_fault(column[row]):
                    verdicts.outcome[row] = INVALID
                    verdicts.faults[row] = fault


@dataclass
class Scan:
    """Tell the usable rows of a table apart without touching images."""

    keep: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)  # images of the rows to keep
    counts: Counts = field(default_factory=Counts)
    bad: list[RowError] = field(default_factory=list)
    soft: bool = False

    def add(self, table: pa.Table, schema: TableSchema, file: str) -> None:
        """Judge the next rows of `file`; `table` has the `light` columns."""
        verdicts, start = schema.judge(table, file), self.counts.rows
        self.bad += [RowError(Place(file, start + row), *fault) for row, fault in sorted(verdicts.faults.items())]
        self.counts.rows += len(table)
        self.counts.ties += int((verdicts.outcome == TIE).sum())
        self.counts.unlabelled += int((verdicts.outcome == UNLABELLED).sum())
        self.soft |= verdicts.soft
        usable = np.flatnonzero(verdicts.outcome >= 0)
        self.keep.append(start + usable)
        self.lengths.append(verdicts.outcome[usable])

    def finish(
        self, rejects: Rejects, file: str, limit: int | None = None, length: int | None = None
    ) -> tuple[np.ndarray, int | None]:
        """Hand counts and bad rows over to `rejects`; return the rows [n] to keep and how many images they have.

        Args:
            rejects: who raises or counts.
            file: where the rows are.
            limit: keep at most so many.
            length: images of every row, if it is known; else the first row says it.
        """
        keep, lengths = (np.concatenate([np.empty(0, np.int64), *part]) for part in (self.keep, self.lengths))
        length = length or (int(lengths[0]) if len(lengths) else None)
        wrong = [
            length_error(Place(file, int(row)), int(found), length)
            for row, found in zip(keep[lengths != length], lengths[lengths != length], strict=True)
        ]
        for error in sorted([*self.bad, *wrong], key=lambda error: error.place.row):
            rejects.add(error)
        keep = keep[lengths == length][:limit]
        rejects.counts.rows += self.counts.rows
        rejects.counts.ties += self.counts.ties
        rejects.counts.unlabelled += self.counts.unlabelled
        rejects.counts.pairs += len(keep)
        return keep, length


def check_caption(caption: Any, place: Place) -> str:
    """Return the caption, halves of characters replaced; raise RowError when it is no text, empty, or book-long."""
    if fault := caption_fault(caption):
        raise RowError(place, *fault)
    return well_formed(caption)


def cell_value(cell: pa.Scalar) -> Any:
    """Return what a cell of a table holds; text that is not UTF-8 as its bytes."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error.object


def cell_fault(cell: pa.Scalar) -> tuple[str, str] | None:
    """Return `caption_fault` of a cell of a table."""
    return caption_fault(cell_value(cell))


def _maybe_bad(column: pa.ChunkedArray) -> np.ndarray:
    """Return which cells [n] to look at one by one: all of a column that is not text."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return np.ones(len(column), dtype=bool)
    if all(_is_utf8(chunk) for chunk in column.chunks):
        is_empty = pc.equal(pc.utf8_trim_whitespace(column), "")
        return pc.fill_null(pc.or_(is_empty, pc.greater(pc.utf8_length(column), MOST_CHARACTERS)), True).to_numpy()
    return np.ones(len(column), dtype=bool)


def _is_utf8(chunk: pa.Array) -> bool:
    """Tell whether all texts are valid; files by careless writers hold others."""
    try:
        chunk.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def image_ref(value: Any, place: Place, reach: Reach) -> ImageRef:
    """Return a reference to an image given as bytes, as a path, or as datasets' {"bytes", "path"}.

    Raises:
        RowError: it is none of these, or a path that leads out of `reach`.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return ImageRef(data=value, place=place)
    if isinstance(value, str) and value:
        if not possible_name(value):
            raise RowError(place, "missing image", f"no file can be called {value[:80]!r}")
        try:
            return ImageRef(path=reach.file(value), place=place)
        except OutsideError as error:
            raise RowError(place, "outside the folder", str(error)) from error
    raise RowError(place, "missing image", f"an image is {value!r}, expected its bytes or a path")


def noise_text(value: Any) -> str | None:
    """Return what an image was drawn from as it is written, or None where it is not known."""
    return value if isinstance(value, str) and value else None
