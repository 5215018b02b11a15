"""CPO (Xu et al. 2024, "Contrastive Preference Optimization", 2401.08417)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, RawMargin, check_number


@dataclass(frozen=True, kw_only=True)
class CPO(RawMargin):
    """DPO under a uniform reference, held by supervised fine-tuning on the winner.

    L = -log sigmoid( beta/2 * (policy_l - policy_w) ) + sft_weight * policy_w    Eq. 4 and 5, errors for likelihoods

    The mapping to diffusion is ours: no published recipe exists. MaPO is the bounded relative of this loss.

    Args:
        beta: scale of the errors, > 0; halved to keep DPO's convention. Ours: 5000 would saturate at once.
        sft_weight: weight of the winner's denoising error, >= 0; the paper's behaviour-cloning term has 1.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: 50 * (0.20 - 0.10) = 5, and log(1 + exp(-5)) = 0.0067.
        >>> from torch import tensor
        >>> CPO(beta=100.0).loss(PairErrors(policy_w=tensor([0.10]), policy_l=tensor([0.20])))
        tensor([0.1067])
    """

    sft_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sft_weight", self.sft_weight, at_least=0.0)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors)) + self.sft_weight * errors.policy_w
