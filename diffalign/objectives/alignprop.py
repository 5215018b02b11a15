"""AlignProp (Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation").

arXiv 2310.03739.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.objectives.base import Objective, Rewards, check_number


@dataclass(frozen=True, kw_only=True)
class AlignProp(Objective[Rewards]):
    """Bring the reward of finished pictures to a target; the gradient flows from a random step of the sampler on.

    L = weight * |target - reward|

    Args:
        weight: of the loss, > 0. The authors' code: 0.01.
        target: reward that is aimed at. The authors' code: 10 for the aesthetic score, 1 for HPSv2.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example:
        >>> from torch import tensor
        >>> AlignProp().loss(Rewards(reward=tensor([0.25, 1.50])))
        tensor([0.0075, 0.0050])
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar[Literal["pair", "single", "list", "transition", "reward"]] = "reward"
    rollout: ClassVar[str] = "random_steps"

    weight: float = 0.01
    target: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, above=0.0)
        check_number("target", self.target)

    def loss(self, rewards: Rewards) -> Tensor:
        """Return the loss of every picture [B]."""
        return self.weight * (self.target - rewards.reward).abs()
