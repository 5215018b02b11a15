"""Noisings: how a noisy latent and its regression target are made from clean ones.

An example has k images: 2 of a pair, 1 alone, or the k of a ranked list. Latents come in the order
[first images of B examples, second images, ...], for pairs [w_1..w_B, l_1..l_B], with one timestep an example.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffalign.denoising.draws import normal
from diffalign.denoising.kernels import triton_for
from diffalign.denoising.paths import NoisePath, add_noise, target

INVERT_INSTEAD = (
    "Choose denoising.noising ddim_inversion (InPO) or renoise_inversion (SmPO), which run the sampler of such a model "
    "backwards, along its curve."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingBatch:
    """Hold N denoising problems on the device of the clean latents, float32; xt may be in the network's dtype."""

    x0: Tensor  # [N,C,H,W], clean latents after the VAE's shift and scale
    noise: Tensor  # [N,C,H,W]
    xt: Tensor  # [N,C,H,W], alpha * x0 + sigma * noise
    target: Tensor  # [N,C,H,W], what the network should predict
    timesteps: Tensor  # [N], what the network is fed: int64 of DDPM, float32 of a flow path
    alpha: Tensor  # [N], coefficient of x0
    sigma: Tensor  # [N], coefficient of the noise

    def select(self, rows: Tensor) -> "DenoisingBatch":
        """Return some of the problems."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def shared(
    path: NoisePath,
    x0: Tensor,
    timesteps: Tensor,
    seed: int,
    step: int,
    example_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> DenoisingBatch:
    """Noise all images of an example with the same noise: x0 [k*B,...], timesteps [B], ids [B]; xt comes in `dtype`.

    The rule of the code and the pseudo-code of Diffusion-DPO, and of MaPO.
    """
    images = len(x0) // len(example_ids)
    noise = normal(seed, step, example_ids, x0.shape[1:]).repeat(images, *(1 for _ in x0.shape[1:]))
    return with_noise(path, x0, noise, timesteps.repeat(images), dtype=dtype)


def independent(
    path: NoisePath,
    x0: Tensor,
    timesteps: Tensor,
    seed: int,
    step: int,
    example_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> DenoisingBatch:
    """Noise each image of an example with its own noise: x0 [k*B,...], timesteps [B], ids [B]; xt comes in `dtype`.

    Eq. 14 of Diffusion-DPO, and Algorithm 2 of RankDPO.
    """
    noise = per_image(seed, step, example_ids, x0, stream="noise")
    return with_noise(path, x0, noise, timesteps.repeat(len(x0) // len(example_ids)), dtype=dtype)


RANDOM_NOISINGS = {"shared": shared, "independent": independent}


def generating(
    path: NoisePath, x0: Tensor, timesteps: Tensor, noise: Tensor, dtype: torch.dtype = torch.float32
) -> DenoisingBatch:
    """Noise each image with what it was drawn from: x0 and noise [k*B,...], timesteps [B]; xt comes in `dtype`.

    On a flow path xt then lies on the straight line from the noise to the picture that the sampler made of it, and the
    target is the direction of that line: PNAPO.

    Raises:
        ConfigError: a path of DDPM.
    """
    path.require_flow("Noising pictures with what they were drawn from", INVERT_INSTEAD)
    return with_noise(path, x0, noise, timesteps.repeat(len(x0) // len(timesteps)), dtype=dtype)


def per_image(seed: int, step: int, example_ids: Tensor, x0: Tensor, stream: str) -> Tensor:
    """Draw for every image of every example: ids [B] -> [k*B,...]. The first image's numbers are those of `stream`."""
    images = len(x0) // len(example_ids)
    names = [image_stream(stream, image) for image in range(images)]
    return torch.cat([normal(seed, step, example_ids, x0.shape[1:], name) for name in names])


def image_stream(stream: str, image: int) -> str:
    """Name the stream of an image of an example: `stream` of the winner, `stream_l` of the loser, `stream_2`, ..."""
    return stream if image == 0 else f"{stream}_l" if image == 1 else f"{stream}_{image}"


def with_noise(
    path: NoisePath,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    xt: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> DenoisingBatch:
    """Build the batch for given noise [N,...] and timesteps [N]; `xt` if it is known already, else made in `dtype`."""
    counts = len(x0), len(noise), len(timesteps)
    assert len(set(counts)) == 1, f"latents, noises and timesteps must be as many, got {counts}"
    x0 = x0.float()
    noise, timesteps = noise.to(x0.device), timesteps.to(x0.device)
    alpha, sigma = path.alpha_sigma(timesteps)
    triton = triton_for(x0) if xt is None else None
    if triton is not None:
        weights = path.target_weights(timesteps)
        xt, wanted = triton.noise_and_target(x0, noise, (alpha, sigma), weights, dtype=dtype)
    else:
        xt = add_noise(path, x0, noise, timesteps).to(dtype) if xt is None else xt
        wanted = target(path, x0, noise, timesteps)
    return DenoisingBatch(x0=x0, noise=noise, xt=xt, target=wanted, timesteps=timesteps, alpha=alpha, sigma=sigma)
