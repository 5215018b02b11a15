"""Which examples come next: a pure function of the seed and of how many were drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from diffalign.data import keyed
from diffalign.data.visits import Visit
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
        draws: serve `Visit`s, whose draw is the epoch modulo this; None: plain indices.
    """

    num_examples: int
    seed: int
    window: int | None = None
    draws: int | None = None

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
            order = keyed.order(f"{self.seed}/{epoch}", self.num_examples, self.window)
            served = order[offset : offset + count - len(drawn)].tolist()
            drawn += served if self.draws is None else [Visit(index, epoch % self.draws) for index in served]
        return drawn


class ClassRatioSampler:
    """Draw desirable and undesirable images in a fixed ratio, each class without replacement in epochs of its own.

    Draw i is desirable if and only if floor((i + 1) r) > floor(i r): of the first n draws exactly floor(n r) are. The
    official script of Diffusion-KTO draws with replacement, right on average only. Stateless, as PairSampler.

    Args:
        desirable: bool [P].
        positive_ratio: r in [0, 1]; 0.8 in the paper.
        seed: selects the orders.

    Raises:
        DataError: a ratio outside [0, 1], or no image of a class that is to be drawn.
    """

    def __init__(self, desirable: Sequence[bool] | np.ndarray, positive_ratio: float, seed: int):
        desirable = np.asarray(desirable, dtype=bool)
        if not 0 <= positive_ratio <= 1:
            raise DataError(f"positive_ratio must be in [0, 1], got {positive_ratio}.")
        self.ratio = Fraction(str(float(positive_ratio)))  # 0.8 is 4/5, not the nearest binary number
        self._members = {True: np.flatnonzero(desirable), False: np.flatnonzero(~desirable)}
        self._samplers = {}
        for wanted, name, share in ((True, "desirable", self.ratio), (False, "undesirable", 1 - self.ratio)):
            members = self._members[wanted]
            if share > 0 and not len(members):
                raise DataError(
                    f"None of the {len(desirable)} images is {name}, but positive_ratio {positive_ratio} asks for "
                    f"{float(share):.0%} of them. Set it to {0 if wanted else 1} or null, or check the labels."
                )
            if len(members):
                self._samplers[wanted] = PairSampler(len(members), keyed.start(f"{seed}/{name}"))

    def indices(self, position: int, count: int) -> list[int]:
        """Return draws number `position` to `position + count - 1`, as indices of the data set."""
        before = [math.floor(i * self.ratio) for i in range(position, position + count + 1)]
        wanted = [after > now for now, after in pairwise(before)]
        positive, starts = sum(wanted), {True: before[0], False: position - before[0]}
        counts = {True: positive, False: count - positive}
        drawn = {
            kind: iter(self._members[kind][sampler.indices(starts[kind], counts[kind])].tolist())
            for kind, sampler in self._samplers.items()
        }
        return [next(drawn[kind]) for kind in wanted]


class CurriculumSampler:
    """Draw from easy to hard: stage j from the first ceil(P (j + 1) / stages) pairs by decreasing margin.

    Curriculum-DPO (Croitoru et al. 2025): pairs with a large difference of scores are easy; every stage adds harder
    ones, the last one has all and goes on for ever. Within a stage as PairSampler, with orders of its own.

    Args:
        margins: [P], score of the winner minus score of the loser.
        stages: how many, at least 1.
        steps_per_stage_examples: examples drawn in a stage (optimizer steps x global batch size), at least 1.
        seed: selects the orders.

    Raises:
        DataError: margins that are not finite, no pair, or numbers below 1.
    """

    def __init__(self, margins: Sequence[float] | np.ndarray, stages: int, steps_per_stage_examples: int, seed: int):
        margins = np.asarray(margins, dtype=np.float64)
        for name, value in (("stages", stages), ("steps_per_stage_examples", steps_per_stage_examples)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}.")
        unknown = int((~np.isfinite(margins)).sum())
        if unknown:
            raise DataError(
                f"{unknown} of {len(margins)} pairs have no margin: a curriculum needs scores of both images. Score "
                "them first: diffalign score DATA --out FILE --with pickscore"
            )
        self._length = steps_per_stage_examples
        self._easiest_first = np.argsort(-margins, kind="stable")
        sizes = [-(-len(margins) * (stage + 1) // stages) for stage in range(stages)]
        self._samplers = [PairSampler(size, keyed.start(f"{seed}/stage {j}")) for j, size in enumerate(sizes)]

    def indices(self, position: int, count: int) -> list[int]:
        """Return draws number `position` to `position + count - 1`, as indices of the data set."""
        drawn: list[int] = []
        while len(drawn) < count:
            at = position + len(drawn)
            stage = min(at // self._length, len(self._samplers) - 1)
            left = count - len(drawn)
            if stage < len(self._samplers) - 1:
                left = min(left, (stage + 1) * self._length - at)
            order = self._samplers[stage].indices(at - stage * self._length, left)
            drawn += self._easiest_first[order].tolist()
        return drawn
