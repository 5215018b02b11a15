"""APO (D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", 2408.06266)."""

from dataclasses import dataclass

from torch import Tensor

from diffalign.objectives.base import PairErrors, ScaledMargin, check_choice


@dataclass(frozen=True, kw_only=True)
class APO(ScaledMargin):
    """Say where winner and loser should go, not only how far apart.

    variant "zero":  L = 1 - sigmoid(u_w) + sigmoid(u_l)            winners up, losers down
    variant "down":  L = sigmoid(u_w) + 1 - sigmoid(u_w - u_l)      both down, losers faster
    with u = beta/2 * (reference - policy)

    "zero" fits data whose winners are better than what the model draws, "down" data whose winners are worse. The
    losses are bounded: pairs far from their goal, right or wrong, stop pushing. The mapping to diffusion is ours.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.
        variant: "zero", for winners better than the model, or "down", for a model better than its winners.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: u_w = 0.5, u_l = -1: 1 - 0.6225 + 0.2689, and 0.6225 + 1 - 0.8176.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> APO(beta=100.0).loss(errors)
        tensor([0.6465])
        >>> APO(beta=100.0, variant="down").loss(errors)
        tensor([0.8049])
    """

    variant: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("zero", "down"))

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        reward_w, reward_l = self.rewards(errors)
        if self.variant == "zero":
            return (-reward_w).sigmoid() + reward_l.sigmoid()
        return reward_w.sigmoid() + (reward_l - reward_w).sigmoid()
