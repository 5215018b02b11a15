"""PNAPO (2026, arXiv 2605.09433), by the authors of InPO and SmPO: a reconstruction, for there is no official code."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.objectives.base import NO_PROGRESS, PairErrors, check_number
from diffalign.objectives.smpo import SmPO


@dataclass(frozen=True, kw_only=True)
class PNAPO(SmPO):
    """Noise every picture with what it was drawn from, weigh pairs by how sure a reward model is, and ease off.

    L = -log sigmoid( g(n) * gamma * (2p - 1) * beta/2 * margin ),  p = P(winner preferred) = sigmoid(reward gap)
    g(n) = end + (1 - end) * (1 + cos(pi * n)) / 2,  n = share of the run's steps that are done

    For flow models. xt = (1 - s) * x0 + s * z and the target is z - x0 with the z that x0 was drawn from, each picture
    its own: the point lies where the sampler passed, and no inversion has to find it.

    No code is published, so this follows what is told of the paper. Ours are: that g is half a cosine (another arc from
    1 to 1/2 would fit the words as well), that n counts optimizer steps, and the scale of the reward gap, which is
    SmPO's, a difference of scores over their range in the data; data.score_range: [0, 1] takes the difference itself.

    Args:
        beta: strength of the KL anchor, > 0. Paper, as reported: 5000 for SD3 (the default here), 2000 for FLUX.
        gamma: multiplies 2p - 1, > 0. 1 leaves it as it is; SmPO has 10.
        end: g at the end of the run, > 0. Paper, as reported: 1/2; 1 keeps the strength.

    Raises:
        ConfigError: a hyperparameter is out of range; data without P(winner preferred).

    Example: half-way, g = 0.75; p = 0.8 multiplies the logit of 1.5 by 0.75 * 0.6.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ...     preference=tensor([0.8]), progress=tensor(0.5),
        ... )
        >>> PNAPO(beta=100.0).loss(errors)
        tensor([0.4116])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "preference", "progress"})
    noising: ClassVar[str] = "generating"

    gamma: float = 1.0
    end: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("end", self.end, above=0.0)

    def strength(self, progress: Tensor) -> Tensor:
        """Return g [] at a share of the run in [0, 1]: exactly 1 at 0, `end` at 1."""
        return self.end + (1 - self.end) * (1 + (math.pi * progress).cos()) / 2

    def logit(self, errors: PairErrors) -> Tensor:
        """Return g(n) * gamma * (2p - 1) * beta/2 * margin [B]."""
        assert errors.progress is not None, NO_PROGRESS
        return self.strength(errors.progress) * super().logit(errors)
