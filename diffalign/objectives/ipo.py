"""IPO (Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences").

arXiv:2310.12036
"""

from dataclasses import dataclass

from torch import Tensor

from diffalign.objectives.base import PairErrors, ScaledMargin


@dataclass(frozen=True, kw_only=True)
class IPO(ScaledMargin):
    """Pull the scaled margin to 1/2 instead of pushing it without end.

    L = ( beta/2 * margin - 1/2 )^2 = tau^2 * ( margin - 1 / (2 * tau) )^2,  tau = beta/2    Eq. 17, times tau^2

    The paper's form has values near 1e-6 at the margins of diffusion errors; the factor tau^2 keeps the optimum and
    gives the loss the size of DPO's, so that learning rates and gradient clipping carry over. The `ipo` branch of
    diffusers' SD script means the same with `tau = beta_dpo`, but reads an option that does not exist.

    Args:
        beta: twice tau, > 0: the margin aimed at is 1 / beta. Ours: DPO's.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: a margin of 0.03 at beta 100 is a logit of 1.5: (1.5 - 0.5)^2.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> IPO(beta=100.0).loss(errors)
        tensor([1.0000])
    """

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the squared distance of every logit from 1/2 [B]."""
        return (self.logit(errors) - 0.5).square()
