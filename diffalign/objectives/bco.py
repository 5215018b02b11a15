"""BCO (Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", 2404.04656)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_choice


@dataclass(frozen=True, kw_only=True)
class BCO(ScaledMargin):
    """Classify winner against loser by their implicit rewards, each on its own.

    L = -log sigmoid(u_w - delta) - log sigmoid(-(u_l - delta)),  u = beta/2 * (reference - policy)
    delta = mean over the batch of (u_w + u_l) / 2, without gradient, or 0

    The shift delta makes the bound on DPO's loss tight (the paper keeps a running mean; TRL's pair form has 0). Here it
    is the mean over the examples of one pass on all devices, so there is no state; with one pair a pass it would take
    the place of that pair's own mean, so use several. With it nothing holds the mean reward itself: a loss that may
    raise all errors alike did so on the embedded world until the pictures were gone. The mapping to diffusion is ours.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.
        shift: "batch", the mean; "zero" anchors the rewards of winners and losers to the reference's own 0.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: u_w = 0.5 and u_l = -1, so delta = -0.25 and both distances are 0.75.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> BCO(beta=100.0).loss(errors)
        tensor([0.7737])
    """

    shift: Literal["batch", "zero"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("shift", self.shift, ("batch", "zero"))

    def statistic(self, errors: PairErrors) -> Tensor | None:
        """Return delta, the mean implicit reward []; None if it is 0."""
        if self.shift == "zero":
            return None
        reward_w, reward_l = self.rewards(errors)
        return ((reward_w + reward_l) / 2).mean().detach()

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        shift = self.statistic(errors) if errors.statistic is None else errors.statistic
        shift = 0.0 if shift is None else shift
        reward_w, reward_l = self.rewards(errors)
        return -F.logsigmoid(reward_w - shift) - F.logsigmoid(shift - reward_l)
