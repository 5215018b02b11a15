"""Diffusion-NPO (Wang et al. 2025, "Negative Preference Optimization for Better Preference Aligned Generation").

arXiv:2505.11245
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class NPO(ScaledMargin):
    """Learn what people do not want: DPO with every label flipped.

    L = -log sigmoid( -beta/2 * margin )

    The result is no model to sample from. It takes the place of the unconditional branch of classifier-free guidance,
    pushing samples away from what it prefers: `diffalign generate --negative-lora DIR`. The official offline code
    (G-U-N/Diffusion-NPO) swaps the images in its data pipeline; here the loss flips the sign, so that `margin` and
    `implicit_accuracy` still refer to the human label and fall during training.

    Args:
        beta: strength of the KL anchor, > 0. The official script's 500 has no factor 1/2 and is 1000 here.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of 0.03 is a logit of 1.5 at beta 100, and -log sigmoid(-1.5) = 1.7014.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> NPO(beta=100.0).loss(errors)
        tensor([1.7014])
    """

    beta: float = 1000.0

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(-self.logit(errors))
