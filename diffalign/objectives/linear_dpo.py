"""Linear-DPO (Li et al. 2026, "Linear Direct Preference Optimization for Diffusion and Flow-Matching", 2605.21123)."""

from dataclasses import dataclass

from torch import Tensor

from diffalign.objectives.base import PairErrors, ScaledMargin, check_number

SLOPE = 0.4  # of the weight in the logit: 0.2 in beta * d, which has no factor 1/2


@dataclass(frozen=True, kw_only=True)
class LinearDPO(ScaledMargin):
    """Widen the gap of the errors with a weight that falls along a line where DPO's falls along a sigmoid.

    L = w * (policy_w - policy_l),  w = clamp( 0.2 * beta * d + 0.5, eta, 1 - eta ) without gradient
    d = (policy_w - policy_l) - (reference_w - reference_l)

    The authors' code (WhynotChen0105/Linear-DPO, `train/train_sd_dpo.py`, `train/train_sd3_dpo.py`) is followed. The
    gradient of DPO is beta/2 * sigmoid(beta/2 * d) times that of policy_w - policy_l; here the factor beta/2 is gone
    and the sigmoid is the hard one of beta * d, so w = 0.5 - 0.4 * logit in terms of DPO's logit: DPO's `beta` is not
    carried over. Only the gradient has a meaning: the value is no utility, and may be negative.

    With eta > 0 a fitted pair (w = eta) goes on being pushed. The paper's reference follows the policy, an exponential
    moving average renewed every optimizer step: `reference.update: ema` with a decay of 0.95 to 0.995, which is no
    property of this loss. Then d stays small, w near 1/2, and nothing ties the policy to the base but a short run.

    Args:
        beta: how soon a pair counts as fitted, > 0: w is eta from a margin of (0.5 - eta) / (0.2 * beta). Authors: 100
            for SD1.5 (the default), 500 for SDXL.
        eta: smallest weight, that of a fitted pair, in [0, 0.5); the largest is 1 - eta. Authors: 0.001 for SD1.5 (the
            default), 0 for SDXL.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: d = -0.03 is a weight of 0.5 - 0.2 * 10 * 0.03 = 0.44 on a gap of -0.1; at beta 100 it is eta.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]),
        ...     reference_w=tensor([0.11]), reference_l=tensor([0.18]),
        ... )
        >>> LinearDPO(beta=10.0).loss(errors)
        tensor([-0.0440])
        >>> LinearDPO(beta=100.0, eta=0.2).weight(errors)
        tensor([0.2000])
    """

    beta: float = 100.0
    eta: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, at_least=0.0, below=0.5)

    def weight(self, errors: PairErrors) -> Tensor:
        """Return w of every pair [B], without gradient: 1/2 where policy and reference agree."""
        return (0.5 - SLOPE * self.logit(errors).detach()).clamp(self.eta, 1 - self.eta)

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the weighted gap of the errors of every pair [B]."""
        return self.weight(errors) * -errors.raw_margin
