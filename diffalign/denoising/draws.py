"""Random numbers keyed by example: pure functions of (seed, step, example id, stream).

Because no generator is advanced, a draw does not depend on the batch it is part of, on its place in it, on the rank or
on what was drawn before: four ranks draw what one does, and a resumed run needs no saved state.

The numbers come from Philox4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"). The counter is (block, step, low word of the example id, high word), the key is (seed, checksum of the
stream's name): one to one for the ranges checked below, so two draws never share their numbers by accident.

A draw is made where the ids are, on a GPU in one kernel (see `kernels`): the torch version has about 150 operations,
each of them a launch. All compute the same random bits; their normal numbers may differ in the last digit, because
their float64 logarithm and cosine do.
"""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.denoising.kernels import triton_for
from diffalign.errors import ConfigError

Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64 tensors that hold unsigned 32-bit numbers

_WORD = 2**32


def normal(seed: int, step: int, example_ids: Tensor, shape: Sequence[int], stream: str = "noise") -> Tensor:
    """Draw standard normal numbers for every example: ids [B] int64 -> [B,*shape] float32.

    Raises ConfigError for a seed outside 0..2^32-1.
    """
    count, key = math.prod(shape), _key(seed, step, example_ids, stream)
    triton = triton_for(example_ids)
    if triton is not None:
        return triton.normal(key, step, example_ids, count).reshape(-1, *shape)
    a, b, c, d = _philox_words(key, step, example_ids, blocks=math.ceil(count / 4))
    # Box-Muller in float64: the rounding to float32 then hides how a machine computes a logarithm or a cosine.
    values = torch.stack([*_box_muller(a, b), *_box_muller(c, d)], dim=-1)
    return values.flatten(1)[:, :count].float().reshape(-1, *shape)


def uniform(seed: int, step: int, example_ids: Tensor, stream: str) -> Tensor:
    """Draw a number in [0, 1) for every example: ids [B] int64 -> [B] float64 of 53 random bits.

    Raises ConfigError for a seed outside 0..2^32-1.
    """
    high, low, _, _ = _philox_words(_key(seed, step, example_ids, stream), step, example_ids, blocks=1)
    return ((high << 21) + (low >> 11)).squeeze(1).double() * 2.0**-53


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt 128-bit counters, four words each, under a 64-bit key, in ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % _WORD, (k1 + 0xBB67AE85) % _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product."""
    product = word * factor  # wraps around in int64; the bits are those of the unsigned product
    return (product >> 32) & (_WORD - 1), product & (_WORD - 1)


def _key(seed: int, step: int, example_ids: Tensor, stream: str) -> tuple[int, int]:
    """Check what identifies a draw; return its Philox key."""
    if not 0 <= seed < _WORD:
        raise ConfigError(f'"seed" must be an integer from 0 to {_WORD - 1}, got {seed}.')
    assert 0 <= step < _WORD, f"step {step} is outside 0..2^32-1"
    assert example_ids.dtype == torch.int64, f"example ids must be int64, got {example_ids.dtype}"
    assert example_ids.ndim == 1, f"example ids must be [B], got {tuple(example_ids.shape)}"
    return seed, zlib.crc32(stream.encode())


def _philox_words(key: tuple[int, int], step: int, example_ids: Tensor, blocks: int) -> Words:
    """Return `blocks` times four random words for every example, each word as [B,blocks]."""
    triton = triton_for(example_ids)
    if triton is not None:
        return triton.philox_words(key, step, example_ids, blocks)
    ids, device = example_ids[:, None], example_ids.device
    block = torch.arange(blocks, device=device)[None, :]
    counter = (block, torch.full_like(block, step), ids & (_WORD - 1), (ids >> 32) & (_WORD - 1))
    return philox4x32(counter, key)


def _box_muller(radial: Tensor, angular: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of random words into pairs of independent standard normal numbers, float64."""
    radius = ((radial + 1).double() / _WORD).log().mul(-2).sqrt()  # +1: the logarithm of (0, 1], never of 0
    angle = angular.double() * (2 * math.pi / _WORD)
    return radius * angle.cos(), radius * angle.sin()
