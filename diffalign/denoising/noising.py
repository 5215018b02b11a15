"""Noisings: how a noisy latent and its regression target are made from clean ones.

Every noising of pairs takes and returns latents in the order [w_1..w_B, l_1..l_B], with one timestep a pair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.denoising.draws import normal
from diffalign.denoising.paths import DDPMPath, add_noise, target


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingBatch:
    """Hold N denoising problems, float32, on the device of the clean latents."""

    x0: Tensor  # [N,C,H,W], clean latents after the VAE's shift and scale
    noise: Tensor  # [N,C,H,W]
    xt: Tensor  # [N,C,H,W], alpha * x0 + sigma * noise
    target: Tensor  # [N,C,H,W], what the network should predict
    timesteps: Tensor  # [N] int64, what the network is fed
    alpha: Tensor  # [N], coefficient of x0
    sigma: Tensor  # [N], coefficient of the noise


def shared(path: DDPMPath, x0: Tensor, timesteps: Tensor, seed: int, step: int, example_ids: Tensor) -> DenoisingBatch:
    """Noise both images of a pair with the same noise: x0 [2B,...], timesteps [B], ids [B].

    The rule of the code and the pseudo-code of Diffusion-DPO, and of MaPO.
    """
    noise = normal(seed, step, example_ids, x0.shape[1:])
    return _noised(path, x0, torch.cat([noise, noise]), timesteps.repeat(2))


def independent(
    path: DDPMPath, x0: Tensor, timesteps: Tensor, seed: int, step: int, example_ids: Tensor
) -> DenoisingBatch:
    """Noise each image of a pair with its own noise: x0 [2B,...], timesteps [B], ids [B]. Eq. 14 of Diffusion-DPO."""
    noise_w = normal(seed, step, example_ids, x0.shape[1:])
    noise_l = normal(seed, step, example_ids, x0.shape[1:], stream="noise_l")
    return _noised(path, x0, torch.cat([noise_w, noise_l]), timesteps.repeat(2))


def single(path: DDPMPath, x0: Tensor, timesteps: Tensor, seed: int, step: int, example_ids: Tensor) -> DenoisingBatch:
    """Noise images that belong to no pair: x0 [N,...], timesteps [N], ids [N]. Winners get the noise `shared` gives."""
    return _noised(path, x0, normal(seed, step, example_ids, x0.shape[1:]), timesteps)


NOISINGS = {"shared": shared, "independent": independent}


def _noised(path: DDPMPath, x0: Tensor, noise: Tensor, timesteps: Tensor) -> DenoisingBatch:
    """Build the batch for given noise [N,...] and timesteps [N]."""
    counts = len(x0), len(noise), len(timesteps)
    assert len(set(counts)) == 1, f"latents, noises and timesteps must be as many, got {counts}"
    x0 = x0.float()
    noise, timesteps = noise.to(x0.device), timesteps.to(x0.device)
    alpha, sigma = path.alpha_sigma(timesteps)
    return DenoisingBatch(
        x0=x0,
        noise=noise,
        xt=add_noise(path, x0, noise, timesteps),
        target=target(path, x0, noise, timesteps),
        timesteps=timesteps,
        alpha=alpha,
        sigma=sigma,
    )
