"""DDPO (Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.objectives.base import Objective, Transitions, check_number


@dataclass(frozen=True, kw_only=True)
class DDPO(Objective[Transitions]):
    """PPO's clipped objective on every step of a trajectory, whose advantage is that of the finished picture.

    L = max( -A r, -A clamp(r, 1 - clip, 1 + clip) ),  r = p(x_p | x_t) / p_old(x_p | x_t),  A = clamp(A, -limit, limit)

    There is no reference: what holds the policy back is the clip, and few updates per rollout. It is the importance
    sampling variant (DDPO-IS) of the paper.

    Args:
        clip_range: ratios are clipped to within this of 1, in (0, 1). The paper's code: 1e-4, small because
            log-probabilities are averaged over C, H, W.
        adv_clip_max: largest advantage, > 0. The paper's code: 5.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: the first has moved further than the clip allows and gets no gradient.
        >>> from torch import tensor
        >>> transitions = Transitions(
        ...     log_prob_w=tensor([-0.300, -0.300]), behavior_log_prob=tensor([-0.301, -0.301]),
        ...     advantages=tensor([1.5, -1.5]),
        ... )
        >>> DDPO().loss(transitions)
        tensor([-1.5001,  1.5015])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"behavior", "advantages"})
    layout: ClassVar[Literal["pair", "single", "list", "transition"]] = "transition"
    rollout: ClassVar[str] = "trajectories"

    clip_range: float = 1e-4
    adv_clip_max: float = 5.0

    def __post_init__(self) -> None:
        check_number("clip_range", self.clip_range, above=0.0, below=1.0)
        check_number("adv_clip_max", self.adv_clip_max, above=0.0)

    def loss(self, transitions: Transitions) -> Tensor:
        """Return the loss of every transition [B]."""
        assert transitions.advantages is not None, "declare advantages in Objective.needs"
        advantages = transitions.advantages.clamp(-self.adv_clip_max, self.adv_clip_max)
        ratio = transitions.behavior_ratio
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantages * ratio, -advantages * clipped)
