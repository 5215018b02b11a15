"""Rank many models from votes over k of them at a time, and choose the k that a vote tells most about.

K-Sort Arena (Li et al. 2024, arXiv:2408.14468). A model's skill is N(mean, variance), its picture in one vote
N(skill, beta^2). For every pair i, q of a vote that is not tied, with the ratings before the vote:

    c^2         = 2 beta^2 + variance_i + variance_q          V(x) = phi(x) / Phi(x)        W(x) = V(x) (V(x) + x)
    mean_i     += variance_i V((mean_i - mean_q) / c) / c                          if i beats q
    mean_i     -= variance_i V((mean_q - mean_i) / c) / c                          if q beats i
    variance_i *= 1 - sum_q (variance_i / c^2) W(x),          x as above

The pairs of a vote are treated as independent, which they are not: from five fresh models on, that last factor is
negative, and so would be the variance. It is kept from falling below `smallest_factor`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr

from diffalign.errors import DataError, UserError, suggestion

MEAN, SIGMA, BETA = 25.0, 25 / 3, 25 / 6  # TrueSkill's; the paper does not give its own
SMALLEST_FACTOR = 0.1  # below what up to four fresh models reach (0.236), so that published updates are unchanged
Array = NDArray[np.float64]


def variance_factors(mean: ArrayLike, variance: ArrayLike, ranks: Sequence[int], beta: float = BETA) -> Array:
    """Return [k] the factors by which a vote multiplies the variances, as published: they may be negative."""
    _, shrink = _moments(*_checked(mean, variance, ranks), beta)
    return 1 - shrink


def update(
    mean: ArrayLike,
    variance: ArrayLike,
    ranks: Sequence[int],
    beta: float = BETA,
    smallest_factor: float = SMALLEST_FACTOR,
) -> tuple[Array, Array]:
    """Return the means [k] and variances [k] after a vote.

    Args:
        mean: [k] before the vote.
        variance: [k] before the vote.
        ranks: [k] 1 is best; equal ranks are a tie and say nothing about the two.
        beta: spread of a model's pictures.
        smallest_factor: in (0, 1]; no vote leaves less than this share of a variance.
    """
    if not 0 < smallest_factor <= 1:
        raise UserError(f"smallest_factor must lie in (0, 1], got {smallest_factor}. {SMALLEST_FACTOR} is usual.")
    mean, variance, ranks = _checked(mean, variance, ranks)
    shift, shrink = _moments(mean, variance, ranks, beta)
    return mean + variance * shift, variance * np.maximum(1 - shrink, smallest_factor)


@dataclass
class Arena:
    """Keep the ratings of named models, take votes, and propose the next match."""

    names: Sequence[str]
    beta: float = BETA
    exploration: float = 1.0  # weight of trying pairs that were compared rarely
    seed: int = 0
    mean: Array = field(init=False)
    variance: Array = field(init=False)
    met: NDArray[np.int64] = field(init=False)  # [n, n] votes in which both took part

    def __post_init__(self) -> None:
        """Start every model with the same rating."""
        self.names = list(self.names)
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise UserError(f"An arena needs at least 2 models with different names, got {', '.join(self.names)}.")
        count = len(self.names)
        self.mean, self.variance = np.full(count, MEAN), np.full(count, SIGMA**2)
        self.met = np.zeros((count, count), dtype=np.int64)
        self.votes = 0
        self._played = np.zeros(count, dtype=np.int64)
        self._random = random.Random(self.seed)

    @property
    def conservative(self) -> Array:
        """[n] mean - 3 sigma: what a model is good for almost surely. Models are ranked by it."""
        return self.mean - 3 * np.sqrt(self.variance)

    def vote(self, names: Sequence[str], ranks: Sequence[int]) -> None:
        """Take one vote over some of the models; rank 1 is best, equal ranks are ties."""
        rows = [self._row(name) for name in names]
        if len(set(rows)) < len(rows):
            raise DataError(f"A vote names every model once, got {', '.join(names)}.")
        self.mean[rows], self.variance[rows] = update(self.mean[rows], self.variance[rows], ranks, self.beta)
        for i in rows:
            for q in rows:
                self.met[i, q] += i != q
        self._played[rows] += 1
        self.votes += 1

    def next_match(self, k: int = 4) -> list[str]:
        """Return the models of the next vote: the one seen least, and the k - 1 opponents with the largest

            -|S_i - S_q| + exploration * sqrt(ln(votes) / met_iq),        S = mean - 3 sigma

        so opponents of like skill, and pairs compared rarely; pairs never compared come first. (As printed, the paper
        has +|S_i - S_q|, against its own text.) Equal candidates are drawn by the seed.
        """
        if not 2 <= k <= len(self.names):
            raise UserError(f"A match has 2 to {len(self.names)} models, got {k}.")
        order = list(range(len(self.names)))
        self._random.shuffle(order)
        pivot = min(order, key=lambda i: self._played[i])
        score = self.conservative

        def worth(q: int) -> tuple[bool, float]:
            likeness = -abs(score[pivot] - score[q])
            met = self.met[pivot, q]
            return met == 0, likeness + (self.exploration * math.sqrt(math.log(self.votes) / met) if met else 0.0)

        opponents = sorted((q for q in order if q != pivot), key=worth, reverse=True)
        return [self.names[i] for i in (pivot, *opponents[: k - 1])]

    def table(self) -> pd.DataFrame:
        """Return rank, model, mean, sigma, score (mean - 3 sigma) and votes, the best first."""
        table = pd.DataFrame(
            {
                "model": self.names,
                "mean": self.mean,
                "sigma": np.sqrt(self.variance),
                "score": self.conservative,
                "votes": self._played,
            }
        ).sort_values("score", ascending=False, kind="stable", ignore_index=True)
        table.insert(0, "rank", range(1, len(table) + 1))
        return table

    def _row(self, name: str) -> int:
        if name not in self.names:
            raise DataError(f'No model "{name}" in the arena.{suggestion(name, self.names)}')
        return self.names.index(name)


def _moments(mean: Array, variance: Array, ranks: NDArray, beta: float) -> tuple[Array, Array]:
    """Return [k] the shift of the mean over the variance, and [k] what the variance's factor loses."""
    shift, shrink = np.zeros_like(mean), np.zeros_like(mean)
    for i in range(len(mean)):
        for q in range(len(mean)):
            if ranks[i] == ranks[q]:
                continue
            sign = 1.0 if ranks[i] < ranks[q] else -1.0
            c = math.sqrt(2 * beta**2 + variance[i] + variance[q])
            x = sign * (mean[i] - mean[q]) / c
            v = math.exp(-0.5 * x * x - 0.5 * math.log(2 * math.pi) - log_ndtr(x))  # phi / Phi, finite for any x
            shift[i] += sign * v / c
            shrink[i] += variance[i] / c**2 * v * (v + x)
    return shift, shrink


def _checked(mean: ArrayLike, variance: ArrayLike, ranks: Sequence[int]) -> tuple[Array, Array, NDArray]:
    mean, variance = np.array(mean, dtype=np.float64), np.array(variance, dtype=np.float64)
    ranks = np.asarray(ranks)
    if mean.ndim != 1 or not mean.shape == variance.shape == ranks.shape or len(mean) < 2:
        shapes = f"{mean.shape}, {variance.shape} and {ranks.shape}"
        raise DataError(f"A vote needs a mean, a variance and a rank of each of 2 or more models, got shapes {shapes}.")
    if not (variance > 0).all():
        raise DataError(f"Variances must be positive, got {variance.min()}.")
    return mean, variance, ranks
