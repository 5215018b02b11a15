"""SPPO (Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", 2405.00675)."""

from dataclasses import dataclass

from torch import Tensor

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class SPPO(ScaledMargin):
    """Regress the implicit rewards to the win probability, centred: 1/2 for the winner, -1/2 for the loser.

    L = (u_w - 1/2)^2 + (u_l + 1/2)^2,  u = beta/2 * (reference - policy)    Eq. 4.7 with hard labels, times (beta/2)^2

    The factor keeps the loss near 1 where the paper's units give 1e-6, so that learning rate and gradient clipping
    behave; the minimum is the same. Not the step-level SPO. The mapping to diffusion is ours.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: u_w = 0.5 is on its target, u_l = -1 is 0.5 beyond it.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> SPPO(beta=100.0).loss(errors)
        tensor([0.2500])
    """

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        reward_w, reward_l = self.rewards(errors)
        return (reward_w - 0.5).square() + (reward_l + 0.5).square()
