"""Diffusion-KTO (Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", 2404.04465)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.objectives.base import Objective, SingleErrors, check_choice, check_number

UTILITIES = ("kahneman_tversky", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3")
BASELINES = ("batch", "class_mean", "mismatched")
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class KTO(Objective[SingleErrors]):
    """Maximise the utility of single images that are labelled desirable or undesirable.

    L = lambda_y * (1 - U(x)),  x = y * beta * (reference - policy - baseline),  y = +1 desirable, -1 undesirable
    kahneman_tversky: U = sigmoid(x)      loss_averse: U = log sigmoid(x)      risk_seeking_3: U = -log sigmoid(-x)
    risk_seeking_1: U = -y * log sigmoid(-y x)      risk_seeking_2: U = y * exp(y x / 100) - 1

    beta has no factor 1/2, as in the authors' code (jacklishufan/diffusion-kto). The baseline has no gradient:
    batch: max(0, mean log-ratio of the batch), the code's default, where the paper has mismatched pairs;
    class_mean: mean of the means of desirable and undesirable images (BCO's); mismatched: mean log-ratio with prompts
    exchanged, at the cost of one more pass of both networks. It couples the examples of one pass on all devices; with
    few of them (below about 8) an image is compared with itself.

    Args:
        beta: strength of the KL anchor, > 0. The paper's value; the script's default is 1000.
        utility: one of the five above. The paper's choice is kahneman_tversky.
        baseline: "batch", "class_mean" or "mismatched".
        lambda_desirable: weight of desirable images, >= 0.
        lambda_undesirable: weight of undesirable images, >= 0.

    Raises:
        ConfigError: a hyperparameter is out of range.

    Example: log-ratios 0.01 and -0.02 have a negative mean, so the baseline is 0: x = 1 and 2.
        >>> from torch import tensor
        >>> errors = SingleErrors(
        ...     policy=tensor([0.10, 0.20]), reference=tensor([0.11, 0.18]), desirable=tensor([True, False])
        ... )
        >>> KTO(beta=100.0).loss(errors)
        tensor([0.2689, 0.1192])
    """

    layout: ClassVar = "single"

    beta: float = 5000.0
    utility: str = "kahneman_tversky"
    baseline: str = "batch"
    lambda_desirable: float = 1.0
    lambda_undesirable: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0.0)
        check_choice("utility", self.utility, UTILITIES)
        check_choice("baseline", self.baseline, BASELINES)
        check_number("lambda_desirable", self.lambda_desirable, at_least=0.0)
        check_number("lambda_undesirable", self.lambda_undesirable, at_least=0.0)

    @property
    def needs(self) -> frozenset[str]:
        """Return the frozen passes to run: the reference, and mismatched prompts if the baseline is made of them."""
        return frozenset({"reference", "mismatched"} if self.baseline == "mismatched" else {"reference"})

    def statistic(self, errors: SingleErrors) -> Tensor:
        """Return the mean log-ratio that the baseline is made of []."""
        if self.baseline == "mismatched":
            assert errors.mismatched_policy is not None, "declare mismatched in Objective.needs"
            return (errors.mismatched_reference - errors.mismatched_policy).mean().detach()
        log_ratio = errors.log_ratio.detach()
        if self.baseline == "batch":
            return log_ratio.mean()
        means = [(log_ratio * side).sum() / (side.sum() + 1e-6) for side in (errors.desirable, ~errors.desirable)]
        return (means[0] + means[1]) / 2

    def logit(self, errors: SingleErrors) -> Tensor:
        """Return x [B], positive where the policy sides with the label."""
        baseline = self.statistic(errors) if errors.statistic is None else errors.statistic
        baseline = baseline.clamp(min=0.0) if self.baseline == "batch" else baseline
        return _sign(errors) * self.beta * (errors.log_ratio - baseline)

    def loss(self, errors: SingleErrors) -> Tensor:
        """Return the loss of every image [B]."""
        x, sign = self.logit(errors), _sign(errors)
        weight = torch.where(errors.desirable, self.lambda_desirable, self.lambda_undesirable)
        return weight * (1 - self._utility(x, sign))

    def _utility(self, x: Tensor, sign: Tensor) -> Tensor:
        """Return U [B]."""
        if self.utility == "kahneman_tversky":
            return x.sigmoid()
        if self.utility == "loss_averse":
            return F.logsigmoid(x)
        if self.utility == "risk_seeking_1":
            return -sign * F.logsigmoid(-sign * x)
        if self.utility == "risk_seeking_2":
            return sign * (sign * x / 100).clamp(max=LARGEST_EXPONENT).exp() - 1
        return -F.logsigmoid(-x)


def _sign(errors: SingleErrors) -> Tensor:
    """Return y [B]: +1 for desirable images, -1 for the others."""
    assert errors.desirable is not None, "KTO needs labelled images"
    return errors.desirable.to(errors.policy.dtype) * 2 - 1
