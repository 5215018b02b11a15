"""DDIM-InPO (Lu et al. 2025, "InPO: Inversion Preference Optimization with Reparametrized DDIM", 2503.18454)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class InPO(ScaledMargin):
    """Compare winner and loser on the noisy latents that DDIM inversion finds for them.

    L = -log sigmoid( beta/2 * [(reference_w - policy_w) - (reference_l - policy_l)] )

    The equation is Diffusion-DPO's; what is new is the problem it is asked on. Instead of random noise, xt is the DDIM
    inversion of x0 up to t, and the target is the noise (xt - alpha * x0) / sigma that makes the one-step estimate of
    x0 exact. `denoising/inversion.py` builds both; the authors' code ends on another noise level than t, which ours
    does only if `inversion.mode` is `official_compat`.

    Args:
        beta: strength of the KL anchor, > 0. The authors' launchers: 5000 for SDXL (the default here), 2000 for SD1.5.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of 0.03 is a logit of 1.5 at beta 100.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> InPO(beta=100.0).loss(errors)
        tensor([0.2014])
    """

    noising: ClassVar[str] = "ddim_inversion"

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors))
