"""DSPO (Zhu et al. 2025, "Direct Score Preference Optimization for Diffusion Model Alignment", ICLR 2025).

No arXiv id is known to us (OpenReview xyfb9HHvMe); the weight has the form of Diffusion-DPO's, 2311.12908.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import PairErrors, ScaledMargin, check_choice

DRIFT_SWITCH = 0.1  # of the authors' SDXL script


@dataclass(frozen=True, kw_only=True)
class DSPO(ScaledMargin):
    """Fine-tune on winners towards a score that is tilted by the preference.

    variant "sd15":  L = mean of ( (policy - target) - beta * w * (policy - reference) )^2 over the winner,
                     w = 1 - sigmoid(beta/2 * margin), with gradient
    variant "sdxl":  L = w^2 * drift_w if drift_w >= 0.1, else w^2;  drift = mean of (policy - reference)^2

    The two scripts of the authors (huaishengzhu/DSPO, `train.py`) are different algorithms with beta apart by five
    orders of magnitude, and nothing public says which is the paper's; both are kept. In terms of errors the first is
    policy_w - c * (policy_w + drift_w - reference_w) + c^2 * drift_w with c = beta * w, since the product of the two
    residuals follows from the three squares. The authors take the drift's mean over the local batch for the switch.

    Args:
        beta: "sd15": 0.001 to 0.05 in the authors' launchers; "sdxl": 1000 to 5000. > 0.
        variant: "sd15" or "sdxl".

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: with beta = 0.01 the weight is 0.5 and the loss is close to the winner's error.
        >>> from torch import tensor
        >>> errors = PairErrors(
        ...     policy_w=tensor([0.10]), policy_l=tensor([0.20]), reference_w=tensor([0.11]),
        ...     reference_l=tensor([0.18]), drift_w=tensor([0.02]), drift_l=tensor([0.02]),
        ... )
        >>> DSPO().loss(errors)
        tensor([0.1000])
        >>> DSPO(variant="sdxl", beta=100.0).loss(errors)
        tensor([0.0333])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "drift"})

    beta: float = 0.01
    variant: str = "sd15"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("sd15", "sdxl"))

    def loss(self, errors: PairErrors) -> Tensor:
        """Return the loss of every pair [B]."""
        assert errors.drift_w is not None, "declare drift in Objective.needs"
        # exp(log sigmoid) has the exact derivative where sigmoid's own, w * (1 - w), has lost its digits.
        weight, drift = F.logsigmoid(-self.logit(errors)).exp(), errors.drift_w
        if self.variant == "sdxl":
            return (weight**2 * drift).where(drift >= DRIFT_SWITCH, weight**2)
        tilt = self.beta * weight
        return errors.policy_w - tilt * (errors.policy_w + drift - errors.reference_w) + tilt**2 * drift
