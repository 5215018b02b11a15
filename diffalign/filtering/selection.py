"""Take the K pairs of highest value, with an optional cap per prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffalign.errors import ConfigError


def parse_keep(text: str) -> float | int:
    """Read how much to keep: a share up to 1 ("0.1", "1.0") as a float, or a number of pairs ("5000") as an int.

    Raises:
        ConfigError: neither.

    Example:
        >>> parse_keep("0.1"), parse_keep("5000")
        (0.1, 5000)
    """
    wrong = ConfigError(f'--keep must be a share such as 0.1 or a number of pairs such as 5000, got "{text}".')
    try:
        number = float(text)
    except ValueError:
        raise wrong from None
    if 0 < number <= 1 and (number < 1 or "." in text):
        return number
    if not (number >= 1 and number.is_integer()):  # NaN and infinity are neither
        raise wrong
    return int(number)


def count_of(keep: float | int, pairs: int) -> int:
    """Return how many of `pairs` a share or number stands for; at least one."""
    return min(keep, pairs) if isinstance(keep, int) else max(1, round(keep * pairs))


def select(
    values: NDArray[np.float64], count: int, groups: Sequence[Any] | None = None, cap: int | None = None
) -> NDArray[np.int64]:
    """Return the indices of the `count` highest values, the highest first; equal values in order of index.

    Fewer come back where there are not as many.

    Args:
        values: [N]; those that are NaN or -inf are never taken.
        count: how many to take.
        groups: the prompt of each [N].
        cap: how many to take of one group at most.
    """
    order = np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")
    order = order[values[order] > -np.inf]  # NaN compares false
    if cap is not None and groups is not None:
        taken_before = pd.Series(np.asarray(groups)[order]).groupby(np.asarray(groups)[order]).cumcount()
        order = order[taken_before.to_numpy() < cap]
    return order[:count]
