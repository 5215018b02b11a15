"""Pairs with scores and weights: who wins, how surely, and how much a pair counts, by reward models or by noise."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from diffalign.data import keyed
from diffalign.data.annotations import SCORE_THEM, Annotations
from diffalign.data.batch import Augment, PreferenceBatch
from diffalign.data.cache import LatentCache
from diffalign.data.online import OnlinePairs
from diffalign.errors import DataError


def score_preference(scores: np.ndarray, score_range: tuple[float, float]) -> np.ndarray:
    """Return P(winner preferred) [n] = sigmoid((s_w - s_l) / (max - min)) of scores [n,2].

    SmPO (Lu et al. 2025) as in the official code: with scores normalised to [0, 1], exp(s_w) / (exp(s_w) + exp(s_l)).
    """
    low, high = score_range
    return np.exp(-np.logaddexp(0, -(scores[:, 0] - scores[:, 1]) / (high - low)))


def flips(example_ids: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Return which labels [n] are flipped with probability `rate`: a pure function of seed and example id [n]."""
    return keyed.uniform(f"flip_labels/{seed}", example_ids) < rate


class AnnotatedPairs:
    """Serve pairs with the scores and weights that were found out about them. All of it is optional and combines.

    In this order: with label_source "reward" the image with the higher score is the winner (equal scores keep the
    label); then the preference is set; then labels are flipped. A flipped pair keeps its preference: what was said of
    one image is now said of the other, else a soft label would say after the flip what it said before.

    Args:
        pairs: a LatentCache or OnlinePairs of pairs. The latter reads every image once to learn the example ids.
        annotations: scores and/or weights; None for label noise alone.
        preference_from: "label": as the data says; with label_source "reward" winners are plain then, as a soft human
            label says nothing about another winner. "scores": `score_preference`.
        score_range: (min, max) that normalises scores; None takes those of the data set.
        label_source: "human" or "reward".
        flip_labels: probability in [0, 1] that a pair is flipped, a pure function of (seed, example id).
        seed: selects the pairs that are flipped.

    Raises:
        DataError: examples that are no pairs, pairs without annotation, settings that need scores without any.
    """

    images_per_example = 2

    def __init__(
        self,
        pairs: LatentCache | OnlinePairs,
        annotations: Annotations | None = None,
        *,
        preference_from: str = "label",
        score_range: tuple[float, float] | None = None,
        label_source: str = "human",
        flip_labels: float = 0.0,
        seed: int = 0,
    ):
        self.pairs, self.preference_from, self.label_source = pairs, preference_from, label_source
        self._check(annotations, flip_labels)
        self.example_ids = pairs.example_ids  # [P]
        self._ids, first = np.unique(self.example_ids, return_index=True)
        rows = None if annotations is None else annotations.rows(self.example_ids)[first]
        scores = None if rows is None or annotations.scores is None else annotations.scores[rows]
        self._weights = None if rows is None or annotations.weights is None else annotations.weights[rows]
        self._rewarded = np.zeros(len(self._ids), dtype=bool)
        if label_source == "reward":
            self._rewarded = scores[:, 1] > scores[:, 0]
            scores = np.where(self._rewarded[:, None], scores[:, ::-1], scores)
        self._preference = None
        if preference_from == "scores":
            self._preference = score_preference(scores, _range(scores, score_range))
        self._flipped = flips(self._ids, flip_labels, seed)
        if scores is not None:
            scores = np.where(self._flipped[:, None], scores[:, ::-1], scores)
        self._scores = scores

    def _check(self, annotations: Annotations | None, flip_labels: float) -> None:
        if self.pairs.images_per_example != 2:
            raise DataError(
                f"Only pairs can be annotated; these examples have {self.pairs.images_per_example} image(s)."
            )
        choices = (("preference_from", self.preference_from, ("label", "scores")),
                   ("label_source", self.label_source, ("human", "reward")))  # fmt: skip
        for name, value, known in choices:
            if value not in known:
                raise DataError(f'{name} must be "{known[0]}" or "{known[1]}", got "{value}".')
            if value == known[1] and (annotations is None or annotations.scores is None):
                raise DataError(
                    f'{name} "{value}" needs a score of both images. Score the pairs: {SCORE_THEM}, and name FILE in '
                    "data.annotations_file; or set data.scorer."
                )
        if not 0 <= flip_labels <= 1:
            raise DataError(f"flip_labels must be a probability in [0, 1], got {flip_labels}.")

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def has_preference(self) -> bool | None:
        """Tell whether pairs carry a soft label; None: not known before reading."""
        if self.preference_from == "scores":
            return True
        return False if self.label_source == "reward" else self.pairs.has_preference

    @property
    def swapped(self) -> np.ndarray:
        """Tell which pairs [P] are served the other way round than labelled."""
        return (self._rewarded ^ self._flipped)[self._at(self.example_ids)]

    @property
    def scores(self) -> np.ndarray | None:
        """Return the scores [P,2] as served, winner first, or None."""
        return None if self._scores is None else self._scores[self._at(self.example_ids)]

    def batch(self, indices: Sequence[int], augment: Augment) -> PreferenceBatch:
        """Return B pairs with scores, weights and preference, augmented as `augment` says for their example ids."""
        batch = self.pairs.batch(indices, augment)
        at = self._at(batch.example_ids.numpy())  # by id, not index: OnlinePairs may replace a broken pair
        turned = batch.swapped(torch.from_numpy((self._rewarded ^ self._flipped)[at]))
        preference = batch.preference if self.label_source == "human" else None
        if self._preference is not None:
            preference = _tensor(self._preference[at])
        return replace(
            turned,
            preference=preference,
            scores=turned.scores if self._scores is None else _tensor(self._scores[at]),
            weights=turned.weights if self._weights is None else _tensor(self._weights[at]),
        )

    def _at(self, example_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ids, example_ids)


def _range(scores: np.ndarray, score_range: tuple[float, float] | None) -> tuple[float, float]:
    """Return (min, max), of the data set if not given."""
    low, high = (float(scores.min()), float(scores.max())) if score_range is None else score_range
    if not low < high:
        where = "score_range" if score_range is not None else "the range of the scores of this data set"
        raise DataError(f"{where} is [{low}, {high}]: max must be greater than min. Set score_range: [min, max].")
    return low, high


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
