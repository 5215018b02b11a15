"""Schemas of preference data as they are published under names of their own.

columns                                                        data set
chosen, rejected                                               Open Image Preferences v1 (binarized)
img_better, img_worse                                          ImageRewardDB, configurations *_pair
path1, path2                                                   HPDv3: the first is the better one
image | image_path | file_path (two), human_preference         HPDv2, train
image | image_path | generations | images, rank | ranking | ranks    HPDv2 test, ImageRewardDB *_group, K-wise lists
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from diffalign.data.lists import ListColumns
from diffalign.data.pair_schemas import ChosenColumns, PairSchema, judge
from diffalign.data.pairs import PairRow, Place, RowError
from diffalign.data.schema import INVALID, UNLABELLED, TableSchema, Verdicts
from diffalign.pictures import Reach

WINNERS = (("chosen", "rejected"), ("img_better", "img_worse"), ("path1", "path2"))
LISTED = ("images", "image", "generations", "image_path", "file_path")  # what a list of images is called
RANKS = ("ranks", "ranking", "rank")
PREFERENCE = "human_preference"


@dataclass(frozen=True)
class ListedPairs(PairSchema, TableSchema):
    """Read a pair that is a list of two images and a list of two labels, as HPDv2's."""

    listed: str = "image_path"
    preference: str = PREFERENCE

    remedy: ClassVar[str] = "Name the caption with caption_column."

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Return the column of both images."""
        return (self.listed,)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the column of both labels."""
        return (self.preference,)

    def judge(self, table: pa.Table, file: str) -> Verdicts:
        """Judge rows by labels and captions."""
        verdicts = Verdicts(np.full(len(table), 2))
        for row, given in enumerate(table.column(self.preference).to_pylist()):
            try:
                winner, preference = self._winner(given, Place(file, row))
            except RowError as error:
                verdicts.outcome[row], verdicts.faults[row] = INVALID, (error.reason, error.detail)
                continue
            verdicts.outcome[row] = 2 if winner >= 0 else winner
            verdicts.soft |= preference is not None
        self.mark_bad_captions(table, verdicts)
        return verdicts

    def read(self, record: Mapping[str, Any], index: int, place: Place, reach: Reach) -> PairRow | int:
        """Return the pair of a row, winner first, or TIE or UNLABELLED."""
        winner, preference = self._winner(record.get(self.preference), place)
        if winner < 0:
            return winner
        images = record[self.listed]
        if not isinstance(images, Sequence) or isinstance(images, str | bytes) or len(images) != 2:
            raise RowError(place, "list length", f'expected two images in "{self.listed}", got {images!r:.80}')
        return self.pair(record, index, place, reach, winner, preference, images)

    def _winner(self, given: Any, place: Place) -> tuple[int, float | None]:
        """Return 0, 1, TIE or UNLABELLED, and P(winner preferred) of soft labels."""
        if given is None or (isinstance(given, Sequence) and len(given) == 0):
            return UNLABELLED, None
        numbers = isinstance(given, list | tuple) and all(isinstance(x, int | float) for x in given)
        if not numbers or len(given) != 2:
            raise RowError(place, "label", f"{self.preference} is {given!r:.80}, expected two labels such as [1, 0]")
        winner, preference = (float(values[0]) for values in judge([given[0]], [given[1]]))
        if winner == INVALID:
            raise RowError(place, "label", f"{self.preference} is {given!r:.80}, expected labels in [0, 1]")
        return int(winner), None if np.isnan(preference) else preference


def published_schema(found: set[str], caption: str, list_labels: str, *, lists: bool) -> TableSchema | None:
    """Return the schema of a published data set that these columns are of, or None.

    lists: whether lists are asked for, where both pairs and lists can be made of them.
    """
    if winners := next((names for names in WINNERS if found.issuperset(names)), None):
        return ChosenColumns(caption, chosen=winners[0], rejected=winners[1])
    listed = next((name for name in LISTED if name in found), None)
    if listed and PREFERENCE in found and not lists:
        return ListedPairs(caption, listed=listed)
    ranks = next((name for name in RANKS if name in found), None)
    if listed and ranks and "scores" not in found:
        return ListColumns(caption, images=listed, scores=ranks, list_labels=list_labels, ranked=True)
    return None
