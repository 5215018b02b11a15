"""Evaluate a frozen network: the reference of a preference objective, and every other pass without gradient."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Predict = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]  # (denoiser, xt, timesteps, cond) -> pred


@dataclass(frozen=True, eq=False)
class FrozenDenoiser:
    """Evaluate a network without gradient, in evaluation mode, through the same `predict` as the policy.

    Run policy and reference under the same autocast and at the same batch size, and their predictions are the same bits
    as long as their weights are.

    Args:
        denoiser: the network; with `frozen_weights` it may be the policy itself.
        predict: the backbone's prediction function.
        frozen_weights: given the network, a context in which it has the weights to be evaluated. With adapters off, the
            reference of a LoRA run is the policy's own base weights, and costs no memory.
        micro_batch_size: images a pass, to bound memory; all at once if None. `cond` must offer `select(indices)`.
    """

    denoiser: nn.Module
    predict: Predict
    frozen_weights: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    micro_batch_size: int | None = None

    @classmethod
    def copy_of(cls, denoiser: nn.Module, predict: Predict, micro_batch_size: int | None = None) -> "FrozenDenoiser":
        """Freeze a copy of a network as it is now: the reference of a full fine-tuning run."""
        duplicate = copy.deepcopy(denoiser).requires_grad_(False).eval()
        return cls(duplicate, predict, micro_batch_size=micro_batch_size)

    def __call__(self, xt: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        """Predict for noisy latents: xt [N,...], timesteps [N], cond of N -> [N,...] float32."""
        weights = self.frozen_weights(self.denoiser) if self.frozen_weights else nullcontext()
        with torch.no_grad(), weights, _evaluating(self.denoiser):
            return torch.cat([self.predict(self.denoiser, *part).float() for part in self._parts(xt, timesteps, cond)])

    def _parts(self, xt: Tensor, timesteps: Tensor, cond: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Split the arguments of a pass into micro-batches."""
        if self.micro_batch_size is None or len(xt) <= self.micro_batch_size:
            yield xt, timesteps, cond
            return
        for indices in torch.arange(len(xt), device=xt.device).split(self.micro_batch_size):
            yield xt[indices], timesteps[indices], cond.select(indices)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, then every submodule back into the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
