"""The two-image schema of Pick-a-Pic: which column is what, who won, what a tie is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.pairs import ImageRef, PairRow, Place, RowError
from diffalign.data.source import Counts, Rejects
from diffalign.errors import DataError, suggestion

TIE, UNLABELLED, INVALID = -1, -2, -3


def judge(label_0: np.ndarray, label_1: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the winner [n] (0, 1, TIE, UNLABELLED or INVALID) and P(winner preferred) [n] (NaN for plain 0/1 labels).

    Labels are in [0, 1], NaN where missing. A tie is a first label of 0.5 or two equal labels: the authors of
    Diffusion-DPO keep label_0 in {0, 1} only, while diffusers' scripts let 0.5 pass as a win of image 0.
    """
    label_0 = np.asarray(label_0, dtype=np.float64)
    label_1 = 1.0 - label_0 if label_1 is None else np.asarray(label_1, dtype=np.float64)
    label_1 = np.where(np.isnan(label_1), 1.0 - label_0, label_1)
    winner = np.where(label_0 > label_1, 0, 1).astype(np.int8)
    winner[(label_0 == label_1) | (label_0 == 0.5)] = TIE
    winner[(label_0 < 0) | (label_0 > 1) | (label_1 < 0) | (label_1 > 1)] = INVALID
    winner[np.isnan(label_0)] = UNLABELLED
    total = label_0 + label_1
    share = np.maximum(label_0, label_1) / np.where(total > 0, total, 1.0)
    preference = np.where((winner >= 0) & (share < 1.0), share, np.nan)
    return winner, preference


@dataclass(frozen=True)
class Columns:
    """Name the columns of a two-image data set."""

    images: tuple[str, str] = ("jpg_0", "jpg_1")
    labels: tuple[str, str] = ("label_0", "label_1")  # the second may be absent: then 1 - the first
    caption: str = "caption"

    def require(self, found: Iterable[str], file: str) -> None:
        """Raise DataError unless the needed columns are among `found`."""
        found = list(found)
        missing = [name for name in (*self.images, self.labels[0], self.caption) if name not in found]
        if missing:
            words = ", ".join(f'"{name}"' for name in missing)
            hint = suggestion(missing[0], found)
            raise DataError(
                f"{file} lacks the column(s) {words}.{hint} It has: {', '.join(found)}. "
                "Name the right ones with image_columns, label_columns and caption_column."
            )

    def light(self, found: Iterable[str]) -> list[str]:
        """Return the columns needed to tell which rows are usable: labels and caption, not the images."""
        return [name for name in (*self.labels, self.caption) if name in found]

    def verdict(self, record: Mapping[str, Any]) -> tuple[int, float | None]:
        """Judge one row: winner (0, 1, TIE, UNLABELLED or INVALID) and preference or None."""
        labels = [_number(record.get(name)) for name in self.labels]
        winner, preference = judge(np.array(labels[:1]), np.array(labels[1:]))
        return int(winner[0]), None if np.isnan(preference[0]) else float(preference[0])

    def pair(self, record: Mapping[str, Any], index: int, place: Place, folder: Path | None = None) -> PairRow:
        """Make a PairRow, winner first, of a row that is no tie. Relative image paths start at `folder`."""
        winner, preference = self.verdict(record)
        if winner < 0:
            raise RowError(place, "label", f"the labels are {[record.get(name) for name in self.labels]}")
        images = [image_ref(record[name], place, folder) for name in self.images]
        known = {*self.images, *self.labels, self.caption}
        extra = {k: v for k, v in record.items() if k not in known and isinstance(v, str | int | float | bool)}
        prompt = check_caption(record[self.caption], place)
        return PairRow(index, prompt, images[winner], images[1 - winner], preference, extra)


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    return float(value) if isinstance(value, int | float) else -1.0  # -1 is no label: INVALID


def check_caption(caption: Any, place: Place) -> str:
    """Return the caption as it is; raise RowError when it is no text or empty."""
    if not isinstance(caption, str) or not caption.strip():
        raise RowError(place, "empty caption", f"the caption is {caption!r}")
    return caption


def image_ref(value: Any, place: Place, folder: Path | None) -> ImageRef:
    """Return a reference to an image given as bytes, as a path, or as datasets' {"bytes", "path"}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return ImageRef(data=value, place=place)
    if isinstance(value, str) and value:
        return ImageRef(path=(folder or Path()) / value, place=place)
    raise RowError(place, "missing image", f"an image is {value!r}, expected its bytes or a path")


@dataclass
class Scan:
    """Tell the usable rows of a table apart without touching images."""

    keep: list[np.ndarray] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    bad: list[RowError] = field(default_factory=list)
    soft: bool = False

    def add(self, table: pa.Table, columns: Columns, file: str) -> None:
        """Judge the next rows of `file`; `table` has the `light` columns."""
        labels = [_floats(table, name, file) for name in columns.labels if name in table.column_names]
        winner, preference = judge(*labels)
        caption = table.column(columns.caption)
        if not (pa.types.is_string(caption.type) or pa.types.is_large_string(caption.type)):
            raise DataError(f'{file}: column "{columns.caption}" holds {caption.type}, expected text.')
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(caption), ""), True).to_numpy()
        start = self.counts.rows
        for row in np.flatnonzero((winner == INVALID) | (empty & (winner >= 0))):
            place = Place(file, start + int(row))
            if winner[row] == INVALID:
                self.bad.append(RowError(place, "label", f"the labels are {[float(x[row]) for x in labels]}"))
            else:
                self.bad.append(RowError(place, "empty caption", f"the caption is {caption[int(row)].as_py()!r}"))
        self.counts.rows += len(table)
        self.counts.ties += int((winner == TIE).sum())
        self.counts.unlabelled += int((winner == UNLABELLED).sum())
        self.soft |= not np.isnan(preference).all()
        self.keep.append(start + np.flatnonzero((winner >= 0) & ~empty))

    def finish(self, rejects: Rejects, limit: int | None = None) -> np.ndarray:
        """Hand counts and bad rows over to `rejects` and return the rows [k] to keep, at most `limit`."""
        for error in self.bad:
            rejects.add(error)
        keep = np.concatenate(self.keep)[:limit] if self.keep else np.empty(0, np.int64)
        rejects.counts.rows += self.counts.rows
        rejects.counts.ties += self.counts.ties
        rejects.counts.unlabelled += self.counts.unlabelled
        rejects.counts.pairs += len(keep)
        return keep


def _floats(table: pa.Table, name: str, file: str) -> np.ndarray:
    column = table.column(name)
    try:
        return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(f'{file}: column "{name}" holds {column.type}, expected numbers in [0, 1].') from error
