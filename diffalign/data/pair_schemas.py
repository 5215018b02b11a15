"""Schemas of pairs: labelled as in Pick-a-Pic, or with the winner named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.pairs import PairRow, Place, RowError
from diffalign.data.schema import (
    INVALID,
    TIE,
    UNLABELLED,
    Schema,
    TableSchema,
    Verdicts,
    check_caption,
    image_ref,
    noise_text,
)
from diffalign.errors import DataError
from diffalign.pictures import Reach


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
class PairSchema(Schema):
    """What the two ways to write a pair share: the images may have a caption each."""

    image_captions: tuple[str, str] | None = None  # captions of the two images (DCPO), in place of `caption`

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Return the column of both captions, or one each."""
        return self.image_captions or (self.caption,)

    def pair(
        self,
        record: Mapping[str, Any],
        index: int,
        place: Place,
        reach: Reach,
        winner: int,
        preference: float | None,
        cells: Sequence[Any] | None = None,
    ) -> PairRow:
        """Make a PairRow, winner first; `cells` hold the images where the columns do not."""
        cells = [record[name] for name in self.image_columns] if cells is None else cells
        images = [image_ref(cell, place, reach) for cell in cells]
        captions = [check_caption(record[name], place) for name in self.caption_columns]
        chosen, rejected = captions[winner % len(captions)], captions[(1 - winner) % len(captions)]
        other = rejected if rejected != chosen else None
        noises = None
        if self.noises is not None:
            drawn_from = [noise_text(record.get(name)) for name in self.noises]
            noises = drawn_from[winner], drawn_from[1 - winner]
        return PairRow(
            index,
            chosen,
            images[winner],
            images[1 - winner],
            preference,
            self.extra(record),
            rejected_prompt=other,
            noises=noises,
        )


@dataclass(frozen=True)
class Columns(PairSchema, TableSchema):
    """Name the columns of a two-image data set with labels, as Pick-a-Pic."""

    images: tuple[str, str] = ("jpg_0", "jpg_1")
    labels: tuple[str, str] = ("label_0", "label_1")  # the second may be absent: then 1 - the first

    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = (("noise_0", "noise_1"),)
    remedy: ClassVar[str] = (
        "Name the right ones with image_columns, label_columns, caption_column and image_caption_columns."
    )

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Return the two image columns."""
        return self.images

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the two label columns."""
        return self.labels

    def judge(self, table: pa.Table, file: str) -> Verdicts:
        """Judge rows by labels and captions."""
        labels = [_floats(table, name, file) for name in self.labels if name in table.column_names]
        winner, preference = judge(*labels)
        verdicts = Verdicts(np.where(winner >= 0, 2, winner), soft=not np.isnan(preference).all())
        for row in np.flatnonzero(winner == INVALID):
            verdicts.faults[int(row)] = "label", f"the labels are {[float(x[row]) for x in labels]}"
        self.mark_bad_captions(table, verdicts)
        return verdicts

    def read(self, record: Mapping[str, Any], index: int, place: Place, reach: Reach) -> PairRow | int:
        """Return the pair of a row, winner first, or TIE or UNLABELLED."""
        labels = [_number(record.get(name)) for name in self.labels]
        winner, preference = (float(values[0]) for values in judge(np.array(labels[:1]), np.array(labels[1:])))
        if winner == INVALID:
            raise RowError(place, "label", f"the labels are {[record.get(name) for name in self.labels]}")
        if winner < 0:
            return int(winner)
        return self.pair(record, index, place, reach, int(winner), None if np.isnan(preference) else preference)


@dataclass(frozen=True)
class ChosenColumns(PairSchema, TableSchema):
    """Name the columns of a row that names the winner; two captions are those of the winner and of the loser."""

    chosen: str = "chosen"
    rejected: str = "rejected"

    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = (("noise_chosen", "noise_rejected"),)
    remedy: ClassVar[str] = "Name the caption with caption_column."

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Return the columns of winner and loser."""
        return self.chosen, self.rejected

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the column of the soft label."""
        return ("preference",)

    @property
    def required(self) -> tuple[str, ...]:
        """Return the columns that must be there."""
        return (*self.image_columns, *self.caption_columns)

    def judge(self, table: pa.Table, file: str) -> Verdicts:
        """Judge rows by preference and captions."""
        verdicts = Verdicts(np.full(len(table), 2))
        given = table.column("preference").to_pylist() if "preference" in table.column_names else ()
        for row, value in enumerate(given):
            if fault := _preference_fault(value):
                verdicts.outcome[row], verdicts.faults[row] = INVALID, ("preference", fault)
            elif value == 0.5:
                verdicts.outcome[row] = TIE
            verdicts.soft |= value not in (None, 0.5, 1)
        self.mark_bad_captions(table, verdicts)
        return verdicts

    def read(self, record: Mapping[str, Any], index: int, place: Place, reach: Reach) -> PairRow | int:
        """Return the pair of a row, or TIE for a preference of 0.5."""
        value = record.get("preference")
        if fault := _preference_fault(value):
            raise RowError(place, "preference", fault)
        if value == 0.5:
            return TIE
        return self.pair(record, index, place, reach, 0, None if value in (None, 1) else value)


def _preference_fault(value: Any) -> str | None:
    """Return why a value is no P(chosen preferred), or None."""
    fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0.5 <= value <= 1)
    return None if fits else f"preference is {value!r}, expected P(chosen preferred) in [0.5, 1]"


@dataclass(frozen=True)
class PairLines(Columns):
    """Read both ways to write a pair in JSON lines."""

    alternative: ClassVar[str] = '"chosen" and "rejected", or '
    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = (("noise_chosen", "noise_rejected"), ("noise_0", "noise_1"))

    def of_line(self, record: Mapping[str, Any], place: Place) -> Schema:
        """Return the schema that fits a line."""
        if "chosen" in record and "rejected" in record:
            schema = ChosenColumns(caption=self.caption, noises=self.noises, image_captions=self.image_captions)
            return schema.of_line(record, place)
        return super().of_line(record, place)


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    return float(value) if isinstance(value, int | float) else -1.0  # -1 is no label: INVALID


def _floats(table: pa.Table, name: str, file: str) -> np.ndarray:
    column = table.column(name)
    try:
        return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(f'{file}: column "{name}" holds {column.type}, expected numbers in [0, 1].') from error
