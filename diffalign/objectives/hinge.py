"""Hinge loss on the DPO logit (SLiC-HF, Zhao et al. 2023, 2305.10425; in the margin form of RSO, 2309.06657)."""

from dataclasses import dataclass

from torch import Tensor

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class Hinge(ScaledMargin):
    """Push the logit of every pair up to 1 and then leave it alone.

    L = max(0, 1 - beta/2 * margin)

    The `hinge` branch of diffusers' SD script; its `--beta_dpo 2500` is `beta=5000` here, as for DPO.

    Args:
        beta: strength of the KL anchor, > 0. Ours: DPO's.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of 0.03 at beta 40 is a logit of 0.6.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> Hinge(beta=40.0).loss(errors)
        tensor([0.4000])
    """

    def loss(self, errors: PairErrors) -> Tensor:
        """Return what every logit lacks of 1 [B]."""
        return (1 - self.logit(errors)).clamp(min=0)
