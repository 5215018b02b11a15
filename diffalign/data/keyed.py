"""Numbers and orders that are a pure function of a text and of integers: no generator, no state."""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def start(text: str) -> int:
    """Hash a text to an unsigned 64-bit number."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(keys: np.ndarray) -> np.ndarray:
    """Finalise uint64 keys as splitmix64 does: bijective on 64 bits, so there are no equal results."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def uniform(text: str, keys: np.ndarray) -> np.ndarray:
    """Return numbers [n] in [0, 1), float64, for integer keys [n] in the stream named by `text`."""
    hashed = mix(mix(np.asarray(keys).astype(np.uint64) * GOLDEN) + np.uint64(start(text)))
    return (mix(hashed) >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=8)
def order(text: str, size: int, window: int | None = None) -> np.ndarray:
    """Return a permutation of 0..size-1, within blocks of `window` if given.

    It sorts by a hash of text and index. Unlike numpy's generators it never changes with the version of numpy.
    """
    keys = mix(np.arange(1, size + 1, dtype=np.uint64) * GOLDEN + np.uint64(start(text)))
    if window is None:
        return np.argsort(keys, kind="stable")
    return np.lexsort((keys, np.arange(size) // window))
