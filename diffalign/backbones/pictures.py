"""Pictures as latents and back: what every family does with its VAE."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError


class Pictures:
    """The part of a backbone that knows its VAE."""

    denoiser: nn.Module
    vae: nn.Module

    @classmethod
    def patch_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return how many latents one token of the denoiser is high and wide."""
        return 1

    @classmethod
    def latent_channels_of(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return C of the latents that the denoiser denoises."""
        return denoiser_config["in_channels"]

    @property
    def latent_channels(self) -> int:
        """Return C of the latents."""
        return self.vae.config.latent_channels

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return C, h, w of the latents of pictures of `resolution` pixels a side."""
        side = resolution // self.vae_scale_factor
        return self.latent_channels, side, side

    @property
    def vae_scale_factor(self) -> int:
        """Return how many pixels a latent is high and wide."""
        return self.scale_factor_of(self.vae.config)

    @staticmethod
    def scale_factor_of(vae_config: Mapping[str, Any]) -> int:
        """Return how many pixels a latent of the VAE is high and wide."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [N,C,h,w] float32 of the scaled latents of `images` [N,3,H,W] in [0,1].

        x0 = mean + std * noise. The VAE's shift and scaling factor are applied to the mean, the factor to the std. Both
        are contiguous, whatever the pictures' memory format: the halves of a batch that is channels-last would pass
        through other kernels than the whole, and policy and reference differ in their last bits before training.

        Raises:
            ModelError: images of another rank or channel count, or sides the VAE cannot divide.
        """
        self._check_images(images)
        shift, scale = self._shift_and_scale()
        with self._stable_vae() as vae:
            mean, std = self._encode(vae, (images * 2 - 1).to(vae.device, vae.dtype))
        return ((mean.float() - shift) * scale).contiguous(), (std.float() * scale).contiguous()

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Return images [N,3,H,W] float32 in [0,1] of scaled latents `x0` [N,C,h,w]; differentiable in `x0`."""
        shift, scale = self._shift_and_scale()
        with self._stable_vae() as vae:
            decoded = self._decode(vae, (x0 / scale + shift).to(vae.device, vae.dtype))
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def _encode(self, vae: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pictures).latent_dist
        return posterior.mean, posterior.std

    def _decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return vae.decode(latents, return_dict=False)[0]

    def _scaling(self) -> Any:
        """Return the numbers that latents are shifted and scaled by, as the fingerprint writes them."""
        return self._shift_and_scale()

    def _shift_and_scale(self) -> tuple[float | Tensor, float | Tensor]:
        config = self.vae.config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)

    @contextmanager
    def _stable_vae(self) -> Iterator[nn.Module]:
        # float16 overflows in VAEs marked force_upcast (SDXL's own): diffusers runs those in float32, so do we.
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.float()
        try:
            yield self.vae
        finally:
            if upcast:
                self.vae.half()

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ModelError(f"Images must have the shape [N,3,H,W], got {list(images.shape)}.")
        self._check_side(*images.shape[2:], self.vae_scale_factor * self.patch_size(self.denoiser.config))

    @staticmethod
    def _check_side(height: int, width: int, factor: int) -> None:
        if height % factor or width % factor:
            raise ModelError(
                f"Image sides must be multiples of {factor} for this model, got {height}x{width}. Choose such a "
                "resolution."
            )
