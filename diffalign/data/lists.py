"""Schemas of lists: k images of one prompt with scores (RankDPO), and single images with a label (Diffusion-KTO)."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from diffalign.data.pairs import ListRow, Place, RowError
from diffalign.data.schema import (
    INVALID,
    TIE,
    UNLABELLED,
    TableSchema,
    Verdicts,
    check_caption,
    image_ref,
    noise_text,
)
from diffalign.errors import DataError, suggestion
from diffalign.pictures import Reach

LABELS = ("win_rate", "as_is")


def win_rate_labels(scores: np.ndarray) -> np.ndarray:
    """Return the share of comparisons each image wins, phi [k] in [0, 1].

    phi_i = C_i / (n (k - 1)),  C_i = #{(r, j != i): R_r(x_i) > R_r(x_j)}   (Syn-Pic, RankDPO, Algorithm 1)

    Equal scores are a win for neither image.

    Args:
        scores: [k,n], of k >= 2 images by n >= 1 scorers; higher is better, on any scale.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] < 2 or scores.shape[1] < 1:
        raise ValueError(f"scores must be [k >= 2 images, n >= 1 scorers], got shape {list(scores.shape)}.")
    k, n = scores.shape
    wins = (scores[:, None] > scores[None]).sum(axis=(1, 2))
    return wins / (n * (k - 1))


@dataclass(frozen=True)
class ListSchema(TableSchema):
    """What lists and single images share: every row is judged on its own, by numbers for its images."""

    @abstractmethod
    def labels(self, record: Mapping[str, Any], place: Place) -> list[float] | int:
        """Return the scores of the images as they stand, or TIE or UNLABELLED; raise RowError for nonsense."""

    @abstractmethod
    def images_of(self, record: Mapping[str, Any]) -> Any:
        """Return what should be the list of images."""

    def judge(self, table: pa.Table, file: str) -> Verdicts:
        """Judge rows by scores and captions."""
        outcome, faults = [], {}
        numbers = table.select([name for name in self.label_columns if name in table.column_names])
        for row, record in enumerate(numbers.to_pylist()):
            try:
                labels = self.labels(record, Place(file, row))
                outcome.append(labels if isinstance(labels, int) else len(labels))
            except RowError as error:
                outcome.append(INVALID)
                faults[row] = error.reason, error.detail
        verdicts = Verdicts(np.array(outcome, dtype=np.int64), faults)
        self.mark_bad_captions(table, verdicts)
        return verdicts

    def read(self, record: Mapping[str, Any], index: int, place: Place, reach: Reach) -> ListRow | int:
        """Return the images of a row, best first, or TIE or UNLABELLED."""
        labels = self.labels(record, place)
        if isinstance(labels, int):
            return labels
        images = self.images_of(record)
        if not isinstance(images, Sequence) or isinstance(images, str | bytes) or len(images) != len(labels):
            found = len(images) if isinstance(images, list | tuple) else repr(images)[:80]
            raise RowError(place, "list length", f"there are {len(labels)} scores, but the images are {found}")
        refs = [image_ref(image, place, reach) for image in images]
        prompt = check_caption(record[self.caption], place)
        return ListRow.ranked(index, prompt, refs, labels, self.extra(record), self._noises(record, len(refs)))

    def _noises(self, record: Mapping[str, Any], count: int) -> list[str | None] | None:
        """Return what the images were drawn from, as they stand; None where nothing is said."""
        if self.noises is None:
            return None
        given = record.get(self.noises[0])
        values = given if isinstance(given, list) else [given]
        return list(map(noise_text, values)) if len(values) == count else [None] * count


@dataclass(frozen=True)
class ListColumns(ListSchema):
    """Name the columns of ranked lists: a caption, k images, and numbers [k] or, of several scorers, [k][n].

    Args:
        caption: the column of the caption.
        images: the column of the images.
        scores: the column of the numbers; a list whose numbers say nothing (all equal) counts as a tie.
        ranked: whether the numbers are ranks, of which the lowest is the best.
        list_labels: "win_rate" turns any scores into win rates, "as_is" takes numbers in [0, 1].
    """

    images: str = "images"
    scores: str = "scores"
    list_labels: str = "win_rate"
    ranked: bool = False  # the numbers are ranks: 1 is the best, equal ones are ties

    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = (("noises",),)
    unit: ClassVar[str] = "lists"
    images_per_example: ClassVar[int | None] = None
    remedy: ClassVar[str] = 'Lists need a caption (caption_column), "images" and "scores".'

    def __post_init__(self):
        if self.list_labels not in LABELS:
            hint = suggestion(self.list_labels, LABELS)
            raise DataError(f'list_labels must be one of {", ".join(LABELS)}, got "{self.list_labels}".{hint}')

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Return the column of the images."""
        return (self.images,)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the column of the scores."""
        return (self.scores,)

    def images_of(self, record: Mapping[str, Any]) -> Any:
        """Return the list of images."""
        return record[self.images]

    def labels(self, record: Mapping[str, Any], place: Place) -> list[float] | int:
        """Return phi [k], or TIE where all are equal."""
        given = record.get(self.scores)
        if given is None:
            return UNLABELLED
        scores = _matrix(given)
        if scores is not None and self.ranked:
            scores = -scores
        if scores is None:
            detail = f"the scores are {_short(given)}, expected a number for each image, or one a scorer for each"
            raise RowError(place, "scores", detail)
        if len(scores) < 2:
            raise RowError(place, "list length", f"a list of {len(scores)} image(s) cannot be ranked")
        if self.list_labels == "as_is":
            phi = self._as_is(given, scores, place)
        else:
            phi = win_rate_labels(scores).tolist()
        return TIE if min(phi) == max(phi) else phi

    def _as_is(self, given: Any, scores: np.ndarray, place: Place) -> list[float]:
        if self.ranked or isinstance(given[0], Sequence) or scores.min() < 0 or scores.max() > 1:
            detail = (
                f'the scores are {_short(given)}, but list_labels "as_is" takes one number in [0, 1] for each image; '
                'set list_labels to "win_rate" to turn any scores into win rates'
            )
            raise RowError(place, "scores", detail)
        return scores[:, 0].tolist()


@dataclass(frozen=True)
class SingleColumns(ListSchema):
    """Name the columns of single images with a label: 1 or true is desirable, 0 or false is not."""

    image: str = "image"
    label: str = "label"

    noise_names: ClassVar[tuple[tuple[str, ...], ...]] = (("noise",),)
    unit: ClassVar[str] = "images"
    images_per_example: ClassVar[int | None] = 1
    remedy: ClassVar[str] = 'Single images need a caption (caption_column), "image" and "label".'

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Return the column of the image."""
        return (self.image,)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the column of the label."""
        return (self.label,)

    def images_of(self, record: Mapping[str, Any]) -> Any:
        """Return the image as a list of one."""
        return [record[self.image]]

    def labels(self, record: Mapping[str, Any], place: Place) -> list[float] | int:
        """Return [1.0] or [0.0]."""
        label = record.get(self.label)
        if label is None:
            return UNLABELLED
        if not isinstance(label, int | float) or label not in (0, 1):
            raise RowError(place, "label", f"the label is {label!r}, expected 1 (desirable) or 0")
        return [float(label)]


def _matrix(given: Any) -> np.ndarray | None:
    """Return scores as [k,n] float64, or None where they are no finite numbers of that shape."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return None
    rows = [row if isinstance(row, Sequence) and not isinstance(row, str | bytes) else [row] for row in given]
    nested = {isinstance(row, Sequence) for row in given}
    flat = [x for row in rows for x in row]
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in flat)
    if not flat or len(nested) != 1 or not numbers or len({len(row) for row in rows}) != 1:
        return None
    return np.array(rows, dtype=np.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
