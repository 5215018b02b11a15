"""SimPO (Meng et al. 2024, "Simple Preference Optimization with a Reference-Free Reward", 2405.14734)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, RawMargin, check_number


@dataclass(frozen=True, kw_only=True)
class SimPO(RawMargin):
    """Ask the winner's error to be smaller than the loser's by a margin; no reference.

    L = -log sigmoid( beta/2 * (policy_l - policy_w) - target_margin )    Eq. 6, with errors for log-likelihoods

    Errors are means over C, H, W, which is the length normalisation of the paper. The mapping to diffusion is ours: no
    published recipe exists. Nothing anchors the policy, and the difference of two images' errors is mostly a property
    of the images, so a smaller beta than DPO's is a good start.

    Args:
        beta: scale of the errors, > 0; halved to keep DPO's convention. Ours: 5000 would saturate at once.
        target_margin: gamma of the paper in logit units, >= 0.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: 50 * (0.20 - 0.10) - 0.5 = 4.5.
        >>> from torch import tensor
        >>> SimPO(beta=100.0).loss(PairErrors(policy_w=tensor([0.10]), policy_l=tensor([0.20])))
        tensor([0.0110])
    """

    target_margin: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("target_margin", self.target_margin, at_least=0.0)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors) - self.target_margin)
