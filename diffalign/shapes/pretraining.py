"""Train an embedded pipeline from nothing: first its VAE on rendered scenes, then text encoders and denoiser together.

This is ordinary latent-diffusion pre-training on a small scale. It stops while the model still follows only part of
its captions: preference alignment needs something left to improve.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffalign.backbones.base import Backbone
from diffalign.backbones.families import family_of
from diffalign.denoising import TimestepSampling, add_noise, target
from diffalign.progress import Progress
from diffalign.shapes.captions import scenes
from diffalign.shapes.pipeline import RESOLUTION
from diffalign.shapes.render import render


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Hold the recipe of an embedded pipeline; the defaults made `assets/tiny-sdxl`."""

    images: int = 20_000
    vae_steps: int = 1_500
    vae_batch_size: int = 32
    vae_crop: int = 32  # pixels; the VAE is convolutional, and a quarter of the image costs a quarter
    vae_learning_rate: float = 3e-3
    denoiser_steps: int = 5_000
    denoiser_batch_size: int = 32
    denoiser_learning_rate: float = 5e-4
    denoiser_cycles: int = 1  # of so many steps each, from the average of the one before, with a fresh optimizer
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    seed: int = 0


def render_dataset(number: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Render training scenes: images [N, 3, 64, 64] in [-1, 1] (the VAE's range) and their captions."""
    rng = random.Random(seed)
    drawn = list(islice(scenes(seed, held_out=False), number))
    pixels = np.stack([np.asarray(render(scene, rng, RESOLUTION)) for scene in drawn])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [scene.caption() for scene in drawn]


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    peak = optimizer.param_groups[0]["lr"]
    warmup = max(0.05, 2 / max(steps, 3))  # OneCycleLR divides by zero where the share is a single step
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=warmup)


def _start_precise(vae: torch.nn.Module) -> None:
    """Start the posterior narrow, std about 0.05: noise of std 1 would drown the latents for hundreds of steps."""
    with torch.no_grad():
        last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv  # SD3's has no quant_conv
        last.bias[vae.config.latent_channels :] = -6.0
        last.weight[vae.config.latent_channels :] *= 0.1


def _batches(number: int, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(0, number, (batch_size,), generator=generator)


def train_vae(pipeline: DiffusionPipeline, images: torch.Tensor, recipe: Pretraining, console: Console) -> float:
    """Train the VAE to reconstruct, set how its latents are shifted and scaled to unit variance; return the last error.

    Only a VAE that has a shift (SD3's) is given one.
    """
    vae = pipeline.vae.train()
    _start_precise(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    rng = random.Random(recipe.seed)
    schedule = _schedule(optimizer, recipe.vae_steps)
    error = torch.tensor(0.0)
    with Progress("VAE, step", recipe.vae_steps, console=console) as shown:
        for index in _batches(len(images), recipe.vae_batch_size, recipe.vae_steps, recipe.seed):
            top, left = (rng.randint(0, RESOLUTION - recipe.vae_crop) for _ in range(2))
            batch = images[index, :, top : top + recipe.vae_crop, left : left + recipe.vae_crop]
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            error = functional.mse_loss(decoded, batch)
            loss = error + 0.5 * functional.l1_loss(decoded, batch) + 1e-6 * posterior.kl().mean() / batch[0].numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            shown.advance(note=f"error {error.item():.4f}")
    vae.eval()
    latents = encode(pipeline, images[:2048])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    return error.item()


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Return the posterior means [N, C, 16, 16] of images, not yet scaled."""
    return torch.cat([pipeline.vae.encode(batch).latent_dist.mean for batch in images.split(batch_size)])


class TextToLatent(torch.nn.Module):
    """Text encoders and denoiser as one module, so that one optimiser and one moving average cover both."""

    def __init__(self, pipeline: DiffusionPipeline):
        """Share the pipeline's modules, all of which are to be trained."""
        super().__init__()
        self.backbone = family_of(type(pipeline).__name__, "the pipeline").over(pipeline, "the pipeline")
        self.encoders = torch.nn.ModuleList(self.backbone.text_encoders).requires_grad_(True)
        self.denoiser = self.backbone.denoiser

    def forward(self, xt: torch.Tensor, timesteps: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Predict from `xt` and captions what the path of the family asks for."""
        sizes = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]]).float().repeat(len(xt), 1)
        cond = self.backbone.condition(self.backbone.encode_prompts(captions), sizes)
        return self.backbone.predict(self.denoiser, xt, timesteps, cond)


def _noised(
    backbone: Backbone, x0: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents, what is to be predicted from them, and their timesteps, shifted as the scheduler does."""
    noise, levels = torch.randn(x0.shape, generator=generator), backbone.path.num_train_timesteps
    # The middle of one of equal parts: of DDPM the very timestep.
    place = (torch.randint(0, levels, (len(x0),), generator=generator).double() + 0.5) / levels
    timesteps = backbone.path.timesteps_at(place, sampling=TimestepSampling(shift=backbone.shift_at(RESOLUTION)))
    problem = backbone.path, x0, noise, timesteps
    return add_noise(*problem), target(*problem), timesteps


def train_denoiser(
    pipeline: DiffusionPipeline, x0: torch.Tensor, captions: list[str], recipe: Pretraining, console: Console
) -> float:
    """Train text encoders and denoiser on scaled latents [N, C, 16, 16], keep their average; return the last error."""
    model = TextToLatent(pipeline).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.denoiser_learning_rate, weight_decay=1e-3)
    schedule = _schedule(optimizer, recipe.denoiser_steps)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    smoothed = None
    with Progress("denoiser, step", recipe.denoiser_steps, console=console) as shown:
        for index in _batches(len(x0), recipe.denoiser_batch_size, recipe.denoiser_steps, recipe.seed + 2):
            xt, wanted, timesteps = _noised(model.backbone, x0[index], generator)
            dropped = torch.rand(len(index), 1, generator=generator) < recipe.caption_dropout
            rows = ["" if blank else captions[i] for i, (blank,) in zip(index.tolist(), dropped.tolist(), strict=True)]
            loss = functional.mse_loss(model(xt, timesteps, rows), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
            shown.advance(note=f"error {smoothed:.4f}")
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return smoothed


def pretrain(pipeline: DiffusionPipeline, recipe: Pretraining, console: Console) -> dict[str, float]:
    """Train the whole pipeline in place; return the final reconstruction and denoising errors."""
    images, captions = render_dataset(recipe.images, recipe.seed)
    vae_error = train_vae(pipeline, images, recipe, console)
    config = pipeline.vae.config
    x0 = (encode(pipeline, images) - (config.shift_factor or 0.0)) * config.scaling_factor
    for cycle in range(recipe.denoiser_cycles):
        error = train_denoiser(pipeline, x0, captions, replace(recipe, seed=recipe.seed + 10 * cycle), console)
    return {"vae_error": vae_error, "denoising_error": error}
