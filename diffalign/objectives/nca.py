"""NCA (Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", 2402.05369)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class NCA(ScaledMargin):
    """Raise the winner's absolute likelihood, not only its distance to the loser.

    L = -log sigmoid(u_w) - (log sigmoid(-u_w) + log sigmoid(-u_l)) / 2,  u = beta/2 * (reference - policy)

    The form for two responses with hard labels. DPO can widen the margin while both likelihoods fall; here u_w is held
    near log 2. The mapping to diffusion is ours.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: u_w = 0.5, u_l = -1: 0.4741 + (0.9741 + 0.3133) / 2.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> NCA(beta=100.0).loss(errors)
        tensor([1.1177])
    """

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        reward_w, reward_l = self.rewards(errors)
        return -F.logsigmoid(reward_w) - (F.logsigmoid(-reward_w) + F.logsigmoid(-reward_l)) / 2
