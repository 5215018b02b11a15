"""Which examples come next: a pure function of the seed and of how many were drawn."""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from diffalign.errors import DataError


@dataclass(frozen=True)
class PairSampler:
    """Draw every example once per epoch, in a fresh order each time.

    There is no state to save: `position` (examples drawn so far, by all ranks together) says everything. A rank takes
    its slice of `indices(position, global_batch)`, so the order does not depend on the number of ranks.

    Args:
        num_examples: size of the data set, at least 1.
        seed: selects the orders.
        window: shuffle only within blocks of so many consecutive examples, for sources that are read in order.
    """

    num_examples: int
    seed: int
    window: int | None = None

    def __post_init__(self):
        if self.num_examples < 1:
            raise DataError("There is no example to draw: the data set is empty.")
        if self.window is not None and self.window < 1:
            raise DataError(f"window must be at least 1 or None, got {self.window}.")

    def indices(self, position: int, count: int) -> list[int]:
        """Return examples number `position` to `position + count - 1` of the endless sequence of epochs."""
        drawn: list[int] = []
        while len(drawn) < count:
            epoch, offset = divmod(position + len(drawn), self.num_examples)
            order = _order(self.seed, epoch, self.num_examples, self.window)
            drawn += order[offset : offset + count - len(drawn)].tolist()
        return drawn


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int, window: int | None) -> np.ndarray:
    """Sort by a hash of (seed, epoch, index). Unlike numpy's generators it never changes with the version of numpy."""
    start = int.from_bytes(blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
    keys = _mix(np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start))
    if window is None:
        return np.argsort(keys, kind="stable")
    return np.lexsort((keys, np.arange(size) // window))


def _mix(keys: np.ndarray) -> np.ndarray:
    """Finalise as splitmix64 does: bijective on 64 bits, so there are no equal keys."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
