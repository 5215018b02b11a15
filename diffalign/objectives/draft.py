"""DRaFT (Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv 2309.17400)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import Objective, Rewards, check_number


@dataclass(frozen=True, kw_only=True)
class DRaFT(Objective[Rewards]):
    """Raise the reward of finished pictures; the gradient flows through the last K steps of the sampler (DRaFT-K).

    L = -weight * reward

    There is no reference and nothing to hold the policy back: watch a scorer that is not trained on.

    Args:
        weight: of the reward, > 0. Ours: 1; Adam makes little of it, gradient clipping may.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example:
        >>> from torch import tensor
        >>> DRaFT().loss(Rewards(reward=tensor([0.5, 2.5])))
        tensor([-0.5000, -2.5000])
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar[Literal["pair", "single", "list", "transition", "reward"]] = "reward"
    rollout: ClassVar[str] = "last_steps"

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, above=0.0)

    def loss(self, rewards: Rewards) -> Tensor:
        """Return the loss of every picture [B]."""
        return -self.weight * rewards.reward
