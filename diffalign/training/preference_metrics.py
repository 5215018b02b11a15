"""What is logged of the errors of a micro-batch: one number an example, without gradient."""

from functools import singledispatch
from typing import Any

from torch import Tensor

from diffalign.objectives.base import ListErrors, Objective, PairErrors, SingleErrors

SATURATED = 3.0  # beyond this logit the gradient weight sigma(-logit) is below 5 %


@singledispatch
def of(errors: Any, objective: Objective[Any]) -> dict[str, Tensor]:
    """Return the metrics of an error container, each [B] or a scalar."""
    raise TypeError(f"no metrics are known for {type(errors).__name__}")


@of.register
def _pair(errors: PairErrors, objective: Objective[Any]) -> dict[str, Tensor]:
    metrics = {"policy_error": (errors.policy_w + errors.policy_l).detach() / 2}
    if hasattr(objective, "logit"):
        metrics["saturation"] = (objective.logit(errors).detach().abs() > SATURATED).float()
    if errors.reference_w is None:
        return metrics | {"raw_margin": errors.raw_margin.detach()}
    return metrics | {
        "implicit_accuracy": errors.implicit_accuracy,
        "margin": errors.margin.detach(),
        "chosen_drift": (errors.policy_w - errors.reference_w).detach(),
        "rejected_drift": (errors.policy_l - errors.reference_l).detach(),
    }


@of.register
def _single(errors: SingleErrors, objective: Objective[Any]) -> dict[str, Tensor]:
    metrics = {"policy_error": errors.policy.detach()}
    if errors.reference is None or errors.desirable is None:
        return metrics
    log_ratio, sign = errors.log_ratio.detach(), errors.desirable.float() * 2 - 1
    metrics |= {"margin": sign * log_ratio, "implicit_accuracy": 0.5 + 0.5 * (sign * log_ratio).sign()}
    if errors.statistic is not None:
        metrics["baseline"] = errors.statistic.detach()
    return metrics


@of.register
def _list(errors: ListErrors, objective: Objective[Any]) -> dict[str, Tensor]:
    metrics = {"policy_error": errors.policy.detach().mean(1)}
    if errors.reference is None:
        return metrics
    gain = (errors.reference - errors.policy).detach()
    better = errors.scores[:, :, None] > errors.scores[:, None]
    difference = gain[:, :, None] - gain[:, None]
    pairs = better.sum(dim=(1, 2)).clamp(min=1)
    agreed = ((0.5 + 0.5 * difference.sign()) * better).sum(dim=(1, 2)) / pairs
    return metrics | {"implicit_accuracy": agreed, "margin": (difference * better).sum(dim=(1, 2)) / pairs}
