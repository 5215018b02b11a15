"""ReFL (Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image", 2304.05977)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import Objective, Rewards, check_number


@dataclass(frozen=True, kw_only=True)
class ReFL(Objective[Rewards]):
    """Raise the reward of the picture that a late step predicts, up to a limit; the gradient flows through that step.

    L = weight * relu(limit - reward)

    Args:
        weight: of the loss, >= 0. The paper's code: 1e-3.
        limit: reward beyond which nothing is learnt. The paper's code: 2, for ImageReward.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: the second picture is good enough.
        >>> from torch import tensor
        >>> ReFL().loss(Rewards(reward=tensor([0.5, 2.5])))
        tensor([0.0015, 0.0000])
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar[Literal["pair", "single", "list", "transition", "reward"]] = "reward"
    rollout: ClassVar[str] = "one_step"

    weight: float = 1e-3
    limit: float = 2.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, at_least=0.0)
        check_number("limit", self.limit)

    def loss(self, rewards: Rewards) -> Tensor:
        """Return the loss of every picture [B]."""
        return self.weight * (self.limit - rewards.reward).relu()
