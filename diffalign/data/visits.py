"""Under which draw an example is shown: one of K that repeat, or another each time that it comes in one step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
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


def key_of(index: int) -> tuple[int, int]:
    """Return the index and the draw of what a sampler serves, -1 for a plain index: visits compare as their indices."""
    return int(index), index.draw if isinstance(index, Visit) else -1


def moved(index: int, to: int) -> int:
    """Return another index under the draw of `index`."""
    return Visit(to, index.draw) if isinstance(index, Visit) else to


def masks(indices: Sequence[int]) -> Tensor:
    """Return what to combine ids [B] with by ^, so that they stand for (example, draw); 0 of plain indices."""
    drawn = [_mask(index.draw) if isinstance(index, Visit) else 0 for index in indices]
    return torch.tensor(drawn, dtype=torch.int64)


class _Sampler(Protocol):
    def indices(self, position: int, count: int) -> list[int]: ...


@dataclass(frozen=True)
class DistinctDraws:
    """Serve the examples of an order; one that comes again in the same optimizer step is a `Visit` of another draw.

    Otherwise it would meet the same timestep and noise twice, and a batch of it would train what one of it trains. The
    first time it is the plain index, so that steps without repetitions draw what they would without this.

    Args:
        order: of the examples; asked for whole optimizer steps.
        ids: [P], equal where examples are the same; None: each index is another.
        draws: K, where `order` serves visits of K draws: repetitions then take the next of them.
    """

    order: _Sampler
    ids: np.ndarray | None = None
    draws: int | None = None

    def indices(self, position: int, count: int) -> list[int]:
        """Return the `count` examples of the optimizer step that starts at `position`."""
        seen: Counter[tuple[int, int]] = Counter()
        served = []
        for index in self.order.indices(position, count):
            place, draw = key_of(index)
            same = place if self.ids is None else int(self.ids[place]), draw
            served.append(self._again(index, seen[same]))
            seen[same] += 1
        return served

    def _again(self, index: int, times: int) -> int:
        if times == 0:
            return index
        return Visit(index, times if self.draws is None else (index.draw + times) % self.draws)


class _Examples(Protocol):
    def batch(self, indices: list[int], augment: Augment) -> PreferenceBatch: ...


class RepeatedDraws:
    """Serve examples by `Visit`, under ids that stand for (example, draw), and by plain index under their own.

    Randomness is keyed by the ids of a batch. With such ids everything that is drawn for an example (flip, caption
    drop, posterior sample, timestep, noise) depends on its draw, whatever step it is shown at and whoever is beside it.
    """

    def __init__(self, examples: _Examples):
        self.examples = examples

    def batch(self, indices: Sequence[int], augment: Augment) -> PreferenceBatch:
        """Gather B examples, augmented as `augment` says for the ids of their visits."""
        changed = masks(indices)

        def keys(example_ids: Tensor) -> Tensor:
            return example_ids ^ changed.to(example_ids.device)

        batch = self.examples.batch(list(indices), lambda example_ids: augment(keys(example_ids)))
        return replace(batch, example_ids=keys(batch.example_ids))


@lru_cache(maxsize=4096)
def _mask(draw: int) -> int:
    """Return 63 bits; under one draw, no two ids become one, under two draws only by a collision of 63-bit hashes."""
    return keyed.start(f"draw {draw}") >> 1
