"""Divergence-minimisation preference optimisation, DMPO (Li et al. 2025, 2507.07510)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_number


@dataclass(frozen=True, kw_only=True)
class DMPO(ScaledMargin):
    """Match the model's preference probability to a smoothed label by the reverse KL divergence.

    L = KL(p || q) = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q)),  p = sigmoid(logit),  q = 1 - alpha

    The reverse direction seeks a mode where DPO's forward one (cross-entropy) covers. The minimum lies at
    logit = log((1 - alpha) / alpha), 4.6 at the default: a pair fitted beyond it is pulled back. EXO (Ji et al. 2024,
    2402.00856) is the same function. The form and the defaults are those of the DMPO mode of AIDC-AI/Diffusion-SDPO,
    `train.py`, by other authors than DMPO's.

    Args:
        beta: strength of the KL anchor, > 0. That code's value.
        alpha: probability in (0, 0.5) given to the loser by the smoothed label. That code's launchers.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: at a logit of 1.5, p = 0.8176.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> DMPO(beta=100.0, alpha=0.1).loss(errors)
        tensor([0.0311])
    """

    beta: float = 2000.0
    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, above=0.0, below=0.5)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the divergence of every pair [B]."""
        logit = self.logit(errors)
        p = logit.sigmoid()
        # log p and log(1 - p) from the logit: p itself rounds to 0 or 1.
        gain_w = F.logsigmoid(logit) - math.log1p(-self.alpha)
        gain_l = F.logsigmoid(-logit) - math.log(self.alpha)
        return p * gain_w + (-logit).sigmoid() * gain_l
