"""A reference that follows the policy: an exponential moving average of it, or a copy renewed now and then."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.training.hooks import StepHook


class MovingReference(StepHook):
    """Keep reference weights for the trained parameters of a policy and lend them to it.

    w_ref <- decay * w_ref + (1 - decay) * w    every `every` optimizer steps; "refresh" is decay = 0

    An average follows as in Diffusion-KTO's `--reference_ema` and Linear-DPO; a renewed copy as in BalancedDPO. With
    LoRA only the adapters are held, so this costs no second network.

    Args:
        parameters: the trained parameters by name, on their device; the reference starts as they are.
        update: "ema" or "refresh".
        decay: of the average, in [0, 1).
        every: optimizer steps between two updates, >= 1.
    """

    def __init__(self, parameters: Mapping[str, Tensor], update: Literal["ema", "refresh"], decay: float, every: int):
        self.parameters, self.every = dict(parameters), every
        self.decay = decay if update == "ema" else 0.0
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @contextmanager
    def lent(self, _: Any = None) -> Iterator[None]:
        """Put the reference's weights into the policy for the time of the context. Nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    def after_step(self, step: int) -> None:
        """Let the reference follow."""
        if (step + 1) % self.every == 0:
            for name, parameter in self.parameters.items():
                self.weights[name].lerp_(parameter.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the reference's weights."""
        return {name: weight.cpu() for name, weight in self.weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved weights."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[name])
