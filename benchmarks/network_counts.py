"""Count what a training run sends through its networks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL

from diffalign.backbones.families import FAMILIES


class NetworkCounts:
    """Count images that pass through a denoiser, with and without gradient, and latents that are decoded."""

    def __init__(self) -> None:
        self.with_gradient, self.without, self.decoded = 0, 0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count every denoiser and every VAE of this process for the time of the context."""
        with ExitStack() as stack:
            for denoiser in {family.denoiser_class for family in FAMILIES}:
                stack.enter_context(mock.patch.object(denoiser, "forward", self._counted(denoiser.forward)))
            stack.enter_context(mock.patch.object(AutoencoderKL, "decode", self._decoded(AutoencoderKL.decode)))
            yield

    def _counted(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(predict)
        def counted(denoiser: Any, *args: Any, **inputs: Any) -> Any:
            images = len(args[0] if args else inputs.get("hidden_states", inputs.get("sample")))
            if torch.is_grad_enabled():
                self.with_gradient += images
            else:
                self.without += images
            return predict(denoiser, *args, **inputs)

        return counted

    def _decoded(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(decode)
        def counted(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.decoded += len(latents)
            return decode(vae, latents, *args, **kwargs)

        return counted
