"""The two factors of a LoRA layer: fuse those of several layers into one, and divide such a one.

A layer's update is alpha / rank * up @ down, and stays the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.errors import ModelError


@dataclass(frozen=True, eq=False)
class Factors:
    """Hold the update of one layer: `down` [r,in] and `up` [out,r], of convolutions [r,in,h,w] and [out,r,1,1]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Return r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Return what up @ down is multiplied by."""
        return self.alpha / self.rank

    def scaled_in(self) -> "Factors":
        """Return the same update with alpha = rank: the scale is multiplied into `up`, in float32."""
        if self.scale == 1:
            return self
        return Factors(self.down, (self.up.float() * self.scale).to(self.up.dtype), float(self.rank))


def divide(factors: Factors, shares: Sequence[int]) -> list[Factors | None]:
    """Return the update of each part of a fused layer, whose rows the parts share in these proportions.

    What `join` made of parts becomes those parts again, None for what was not there. Otherwise every part gets all of
    `down` and its rows of `up`.

    Raises:
        ModelError: the rows cannot be divided so.
    """
    ups = _rows(factors.up, shares)
    columns = _own_columns(ups, factors.rank)
    if columns is None:
        return [replace(factors, up=up) for up in ups]
    return [
        Factors(factors.down[own], up[:, own], factors.alpha * len(own) / factors.rank) if len(own) else None
        for own, up in zip(columns, ups, strict=True)
    ]


def join(parts: Sequence[Factors | None], shares: Sequence[int]) -> Factors:
    """Return the update of a fused layer: exactly that of its parts, none where one is None.

    Parts with one `down` in common keep it. Otherwise the downs are stacked and the ups stand on a diagonal, so that
    the ranks add up.
    """
    given = [part for part in parts if part is not None]
    first = given[0]
    unit = next(part.up.shape[0] // share for part, share in zip(parts, shares, strict=True) if part is not None)
    heights = [share * unit for share in shares]
    if all(part.alpha == first.alpha and _equal(part.down, first.down) for part in given):
        blank = [first.up.new_zeros(height, first.rank) for height in heights]
        ups = [empty if part is None else part.up for part, empty in zip(parts, blank, strict=True)]
        return replace(first, up=torch.cat(ups))
    if any(part.scale != first.scale for part in given):
        parts = [None if part is None else part.scaled_in() for part in parts]
        given = [part for part in parts if part is not None]
    rank = sum(part.rank for part in given)
    up, row, column = torch.zeros(sum(heights), rank, dtype=torch.cat([part.up[:1, :1] for part in given]).dtype), 0, 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            up[row : row + height, column : column + part.rank] = part.up
            column += part.rank
        row += height
    return Factors(torch.cat([part.down for part in given]), up, given[0].alpha * rank / given[0].rank)


def turn(factors: Factors) -> Factors:
    """Return the update of a layer that makes (scale, shift) where this one makes (shift, scale), or the reverse.

    A layer that makes more than these two is the same in both networks, and stays.
    """
    if factors.up.shape[0] != 2 * factors.down.shape[1]:
        return factors
    return replace(factors, up=torch.cat(factors.up.chunk(2)[::-1]))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _rows(up: Tensor, shares: Sequence[int]) -> list[Tensor]:
    unit, rest = divmod(up.shape[0], sum(shares))
    if rest:
        raise ModelError(f"{up.shape[0]} rows cannot be divided into parts of the proportions {tuple(shares)}.")
    return list(up.split([share * unit for share in shares]))


def _own_columns(ups: Sequence[Tensor], rank: int) -> list[Tensor] | None:
    """Return which columns belong to each part, if each column belongs to one."""
    used = torch.stack([(up != 0).any(0) for up in ups])
    each, rest = divmod(rank, len(ups))
    if not rest and all(not used[part, torch.arange(rank) // each != part].any() for part in range(len(ups))):
        return list(torch.arange(rank).split(each))  # also where some of `up` never left 0
    if (used.sum(0) == 1).all():
        return [torch.nonzero(row)[:, 0] for row in used]
    return None
