"""Examples whose randomness repeats: every example is shown under one of K draws, again and again."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from diffalign.data import keyed
from diffalign.data.batch import Augment, PreferenceBatch


class Visit(int):
    """Be the index of an example, and know under which draw it is shown this time."""

    draw: int

    def __new__(cls, index: int, draw: int) -> Self:
        """Attach a draw, 0 or more, to an index."""
        visit = super().__new__(cls, index)
        visit.draw = draw
        return visit


class _Examples(Protocol):
    def batch(self, indices: list[int], augment: Augment) -> PreferenceBatch: ...


class RepeatedDraws:
    """Serve examples by `Visit`, under ids that stand for (example, draw).

    Randomness is keyed by the ids of a batch. With such ids everything that is drawn for an example (flip, caption
    drop, posterior sample, timestep, noise) depends on its draw, whatever step it is shown at and whoever is beside it.
    """

    def __init__(self, examples: _Examples):
        self.examples = examples

    def batch(self, indices: Sequence[Visit], augment: Augment) -> PreferenceBatch:
        """Gather B examples, augmented as `augment` says for the ids of their visits."""
        masks = torch.tensor([_mask(visit.draw) for visit in indices], dtype=torch.int64)

        def keys(example_ids: Tensor) -> Tensor:
            return example_ids ^ masks.to(example_ids.device)

        batch = self.examples.batch(list(indices), lambda example_ids: augment(keys(example_ids)))
        return replace(batch, example_ids=keys(batch.example_ids))


@lru_cache(maxsize=4096)
def _mask(draw: int) -> int:
    """Return 63 bits; under one draw, no two ids become one, under two draws only by a collision of 63-bit hashes."""
    return keyed.start(f"draw {draw}") >> 1
