"""Paired statistics over prompts: win rate, bootstrap and Wilson intervals, the sign test.

Everything here compares two aligned arrays with one number per prompt. Pictures of one prompt are not
independent, so their scores are averaged before they come here and resampling happens over prompts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from diffalign.errors import DataError, UserError

Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

# Resampled scores held in memory at once; 4 million float64 are 32 MB.
_CHUNK_ELEMENTS = 4_000_000


class Interval(NamedTuple):
    """Hold the two ends of an interval."""

    low: float
    high: float


def prompt_wins(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return 1 where a is higher, 0.5 where they are equal and 0 where b is higher, in the shape of the inputs."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a > b) + 0.5 * (a == b)


def win_rate(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the share of prompts [..., P] on which a beats b; a tie counts half.

    win_rate = mean_p( [a_p > b_p] + 0.5 [a_p == b_p] )
    """
    return prompt_wins(a, b).mean(axis=-1)


def mean_difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of a - b over prompts [..., P]."""
    return (np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean(axis=-1)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = win_rate,
    *,
    n: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    indices: ArrayLike | None = None,
) -> Interval:
    """Return the percentile interval of `statistic` when prompts are drawn again with replacement.

    A prompt enters with both its scores, so what the two models have in common cancels. Efron (1979); the ends are
    linearly interpolated quantiles (1 - level)/2 and (1 + level)/2. With fewer than two prompts both ends are NaN.

    Args:
        a: [P] one score per prompt of the first model.
        b: [P] the same prompts, second model.
        statistic: reduces the last axis of two [..., P] arrays, e.g. `win_rate`, `mean_difference`.
        n: resamples.
        seed: of the resampling.
        level: coverage aimed at, in (0, 1).
        indices: [n, P] prompts of each resample, instead of drawing them.

    Raises:
        DataError: for arrays that are empty, not aligned or not finite.
    """
    a, b = _paired(a, b)
    _check_level(level)
    if n < 1:
        raise UserError(f"The bootstrap needs at least 1 resample, got {n}. 10000 is usual.")
    if len(a) < 2:
        return Interval(math.nan, math.nan)
    drawn = [np.asarray(indices)] if indices is not None else _resamples(len(a), n, seed)
    values = np.concatenate([statistic(a[prompts], b[prompts]) for prompts in drawn])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def seeded_bootstrap(
    a: ArrayLike, b: ArrayLike, statistic: Statistic = win_rate, *, n: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the interval of `statistic`'s mean over training runs when runs and prompts are both drawn again.

    The pigeonhole bootstrap of a table whose rows (seeds) and columns (prompts) are both samples: Owen (2007), The
    pigeonhole bootstrap, Annals of Applied Statistics 1(2). It tends to be too wide rather than too narrow; of few
    seeds it knows little, and with one it is `paired_bootstrap`.

    Args:
        a: [S, P] one score per training run and prompt of the first model.
        b: [S, P] or [P] the same of the second; a base model that nobody trained has one row.
        statistic: reduces the last axis of two [..., P] arrays.
        n: resamples.
        seed: of the resampling.
        level: coverage aimed at, in (0, 1).

    Raises:
        DataError: for arrays that are empty, not aligned or not finite.
    """
    a = np.atleast_2d(np.asarray(a, dtype=np.float64))
    b = np.broadcast_to(np.asarray(b, dtype=np.float64), a.shape) if np.ndim(b) == 1 else np.asarray(b, np.float64)
    _paired(a.ravel(), b.ravel())
    if a.shape != b.shape:
        raise DataError(f"Paired scores need the same runs and prompts, got shapes {a.shape}, {b.shape}.")
    _check_level(level)
    runs = np.random.default_rng([seed, 1]).integers(0, len(a), size=(n, len(a)))
    prompts = np.concatenate(list(_resamples(a.shape[1], n, seed)))
    pairs = zip(runs, prompts, strict=True)
    values = [statistic(a[rows][:, columns], b[rows][:, columns]).mean() for rows, columns in pairs]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _resamples(prompts: int, n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield n resamples of the prompts [rows, prompts], some at a time: all together may not fit into memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // prompts)
    for start in range(0, n, rows):
        yield generator.integers(0, prompts, size=(min(rows, n - start), prompts))


def wilson_interval(successes: float, trials: int, level: float = 0.95) -> Interval:
    """Return Wilson's (1927) score interval of a proportion.

    Unlike the bootstrap it keeps a width when every prompt was won. Split ties may enter as half successes.
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"Expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    z = ndtri((1 + level) / 2)
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Interval(max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def binomial_test(successes: int, trials: int) -> float:
    """Return the exact two-sided p-value of `successes` in `trials` under a probability of 1/2; 1 without trials.

    With wins as successes and wins plus losses as trials this is the sign test: ties carry no information about
    the direction and are left out.
    """
    from scipy.stats import binomtest  # a second to import

    return 1.0 if trials == 0 else float(binomtest(successes, trials, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values, in the given order.

    Judging by whichever of several scorers came out best is safe with these, not with the raw ones.
    """
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"Paired scores need one number per prompt in the same order, got shapes {a.shape}, {b.shape}.")
    if len(a) == 0:
        raise DataError("There are no scores to compare: expected at least one prompt.")
    bad = ~(np.isfinite(a) & np.isfinite(b))
    if bad.any():
        raise DataError(f"{bad.sum()} of {len(a)} paired scores are not finite (first at {bad.argmax()}). Score again.")
    return a, b


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"The confidence level must lie between 0 and 1, got {level}. 0.95 is usual.")
