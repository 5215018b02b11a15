"""Train an embedded pipeline's VAE on rendered scenes: both halves together, later the decoder alone.

Latents are settled once the first part is done, so that a denoiser can be trained on them while the decoder goes on.
The decoder then learns from latents with a little noise: a denoiser's latents are never quite right, and what it draws
shall be as sharp as what was rendered.
"""

import random
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from torch.nn import functional

from diffalign.progress import Progress
from diffalign.shapes.pipeline import RESOLUTION
from diffalign.shapes.recipe import Pretraining


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of every part: a short warm-up to the optimizer's rate, then down to nothing."""
    peak = optimizer.param_groups[0]["lr"]
    warmup = max(0.05, 2 / max(steps, 3))  # OneCycleLR divides by zero where the share is a single step
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=warmup)


def batches(number: int, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the indices [batch_size] of every step's examples."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(0, number, (batch_size,), generator=generator)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Return the posterior means [N, C, 16, 16] of images, not yet scaled."""
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(batch_size)])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> float:
    """Return the mean over images [N, 3, H, W] in [-1, 1] of 10 log10(1 / MSE) of their reconstructions, in dB."""
    ratios = []
    for batch in images.split(batch_size):
        decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(-10 * torch.log10(((decoded - batch) / 2).square().mean((1, 2, 3))))
    return torch.cat(ratios).mean().item()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, recipe: Pretraining, console: Console) -> float:
    """Train both halves, set how latents are shifted and scaled to unit variance; return the last error.

    Only a VAE that has a shift (SD3's) is given one.
    """
    _start_precise(vae)

    def decoded(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        posterior = vae.encode(batch).latent_dist
        return vae.decode(posterior.sample()).sample, 1e-6 * posterior.kl().mean() / batch[0].numel()

    error = _fit(vae, decoded, images, recipe, (recipe.vae_steps, recipe.vae_learning_rate, "VAE"), console)
    latents = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    return error


def train_decoder(vae: AutoencoderKL, images: torch.Tensor, recipe: Pretraining, console: Console) -> float:
    """Train the decoder on, from latents with noise of up to `decoder_noise` of their size; return the last error."""
    vae.encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.seed + 3)

    def decoded(batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean.float()
        size = torch.rand(len(batch), 1, 1, 1, generator=generator) * recipe.decoder_noise / vae.config.scaling_factor
        return vae.decode(latents + size * torch.randn(latents.shape, generator=generator)).sample, 0.0

    error = _fit(vae, decoded, images, recipe, (recipe.decoder_steps, recipe.decoder_learning_rate, "decoder"), console)
    vae.encoder.requires_grad_(True)
    return error


def _fit(
    vae: AutoencoderKL,
    decoded: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | float]],
    images: torch.Tensor,
    recipe: Pretraining,
    part: tuple[int, float, str],
    console: Console,
) -> float:
    """Take a part's steps on random crops; `decoded` gives a batch's reconstruction and what is added to its loss."""
    steps, rate, name = part
    trained = [parameter for parameter in vae.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule, rng, error = one_cycle(optimizer, max(steps, 1)), random.Random(recipe.seed), torch.tensor(0.0)
    with Progress(f"{name}, step", steps, console=console) as shown:
        for index in batches(len(images), recipe.vae_batch_size, steps, recipe.seed):
            top, left = (rng.randint(0, RESOLUTION - recipe.vae_crop) for _ in range(2))
            batch = images[index, :, top : top + recipe.vae_crop, left : left + recipe.vae_crop]
            with torch.autocast("cpu", torch.bfloat16):
                reconstruction, regulariser = decoded(batch)
            error = functional.mse_loss(reconstruction.float(), batch)
            loss = error + 0.5 * functional.l1_loss(reconstruction.float(), batch) + regulariser
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            shown.advance(note=f"error {error.item():.5f}")
    vae.eval()
    return error.item()


def _start_precise(vae: AutoencoderKL) -> None:
    """Start the posterior narrow, std about 0.05: noise of std 1 would drown the latents for hundreds of steps."""
    with torch.no_grad():
        last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv  # SD3's has no quant_conv
        last.bias[vae.config.latent_channels :] = -6.0
        last.weight[vae.config.latent_channels :] *= 0.1
