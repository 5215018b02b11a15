"""A beta that keeps the loss from saturating, whatever the scale of the margins."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.objectives.base import Objective
from diffalign.training.hooks import StepHook


class AutoBeta(StepHook):
    """Choose beta so that a pair of average |margin| still has the gradient factor sigmoid(-logit) asked for.

    beta = clamp( -2 * logit(gradient_factor) / m, low, high ),  m <- decay * m + (1 - decay) * mean |margin|

    The rule of SimpleTuner's flow DPO, which sums errors where we average them; m starts with the first margin that is
    not 0, and until then the objective's own beta holds. The mean is over all processes; beta moves between optimizer
    steps only.

    Args:
        gradient_factor: in (0, 0.5), e.g. 0.2, for which beta = 2.77 / m.
        decay: of the moving average, in [0, 1).
        limits: smallest and largest beta.
        reduce: averages a tensor over processes.
    """

    def __init__(
        self,
        gradient_factor: float,
        decay: float = 0.99,
        limits: tuple[float, float] = (1.0, 1e5),
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.logit, self.decay, self.limits, self.reduce = _logit(gradient_factor), decay, limits, reduce
        self.average = 0.0
        self._seen: list[Tensor] = []

    @property
    def beta(self) -> float | None:
        """Return the beta to use, or None before any margin was seen."""
        if self.average <= 0:
            return None
        low, high = self.limits
        return min(max(-2 * self.logit / self.average, low), high)

    def applied_to(self, objective: Objective[Any]) -> Objective[Any]:
        """Return the objective with the present beta."""
        return objective if self.beta is None else replace(objective, beta=self.beta)

    def observe(self, margin: Tensor) -> None:
        """Note the margins [B] of a micro-batch."""
        self._seen.append(margin.detach().abs())

    def after_step(self, step: int) -> None:
        """Update the average with the margins of the step."""
        mean = self.reduce(torch.cat(self._seen).mean()).item()
        self._seen = []
        self.average = self.decay * self.average + (1 - self.decay) * mean if self.average > 0 else mean

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self.average = state["average"]


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
