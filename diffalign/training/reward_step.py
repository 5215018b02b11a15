"""Learning from the gradient of a reward: the policy draws, a reward model judges, the step follows its gradient."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from diffalign.data.visits import DistinctDraws
from diffalign.objectives.base import Objective, Rewards
from diffalign.training.hooks import StepHook


@dataclass(kw_only=True)
class RewardStep(StepHook):
    """Compute the loss [B] and the metrics of one picture for each of B prompts.

    Args:
        rewards: draws for prompts (by position in the data) with a policy at an optimizer step; [B] with gradient.
        order: which prompts come next.
    """

    objective: Objective
    rewards: Callable[[nn.Module, list[int], int], Tensor]
    order: DistinctDraws
    auto_beta: None = None  # for pairs of given images only

    def __call__(self, policy: nn.Module, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses [B] with gradient and detached metrics of the prompts at `indices`."""
        drawn = Rewards(reward=self.rewards(policy, indices, step))
        loss = self.objective.loss(drawn)
        return loss, {"loss": loss.detach(), "reward": drawn.reward.detach()}
