"""f-DPO (Wang et al. 2023, "Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints", 2309.16240)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_choice, check_number

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 80.0  # exp(80) times beta/2 is still finite in float32


@dataclass(frozen=True, kw_only=True)
class FDPO(ScaledMargin):
    """Anchor the policy by another divergence than the reverse KL of DPO.

    L = -log sigmoid( s(u_w) - s(u_l) ),  u = beta/2 * (reference - policy),  s(u) = f'(exp(u)):
    reverse_kl: u (this is DPO)    forward_kl: -exp(-u)    js: log sigmoid(u)    alpha: exp((alpha - 1) u) / (alpha - 1)

    Constants that cancel in the difference are left out. TRL applies f' to the log-ratio before beta; errors of images
    differ by 1e-3, where every f is a straight line and all divergences would be DPO, so here beta comes first.
    forward_kl and alpha punish a winner that lost likelihood exponentially: expect spikes, and keep beta small.

    Args:
        beta: scale of the log-ratios, > 0. Ours: DPO's.
        divergence: "reverse_kl", "forward_kl", "js" or "alpha".
        alpha: for "alpha", in (0, 1); towards 1 it is reverse KL (DPO), towards 0 forward KL.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: u_w = 0.5, u_l = -1: log sigmoid gives -0.4741 and -1.3133, and -log sigmoid(0.8392) = 0.3591.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> FDPO(beta=100.0, divergence="js").loss(errors)
        tensor([0.3591])
    """

    divergence: str = "js"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_number("alpha", self.alpha, above=0.0, below=1.0)

    def score(self, log_ratio: Tensor) -> Tensor:
        """Return s(u) [B]."""
        if self.divergence == "reverse_kl":
            return log_ratio
        if self.divergence == "forward_kl":
            return -(-log_ratio).clamp(max=LARGEST_EXPONENT).exp()
        if self.divergence == "js":
            return F.logsigmoid(log_ratio)
        return ((self.alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT).exp() / (self.alpha - 1)

    def logit(self, errors: PairErrors) -> Tensor:
        """Return s(u_w) - s(u_l) [B], 0 where policy and reference agree."""
        reward_w, reward_l = self.rewards(errors)
        return self.score(reward_w) - self.score(reward_l)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        return -F.logsigmoid(self.logit(errors))
