"""Train an embedded pipeline from nothing: its VAE on rendered scenes, then text encoders and denoiser together.

This is ordinary latent-diffusion pre-training on a small scale. The captions are wrong for a known share, so that the
model draws sharp pictures that show something else than was asked for: preference alignment needs something left to
improve. Two more models come with the base, an early one and one that goes on with captions that are right: pairs are
drawn by all three, as those of Pick-a-Pic are by models of different quality.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from rich.console import Console
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffalign.backbones.base import Backbone
from diffalign.backbones.families import family_of
from diffalign.denoising import TimestepSampling, add_noise, target
from diffalign.progress import Progress
from diffalign.shapes.autoencoder import batches, encode, one_cycle, train_decoder, train_vae
from diffalign.shapes.captions import Scene, scenes
from diffalign.shapes.confusion import confuse
from diffalign.shapes.pipeline import RESOLUTION, build_epsilon_scheduler
from diffalign.shapes.recipe import Pretraining
from diffalign.shapes.render import render

Keep = Callable[[str], None]  # called with "early", "base" and "strong" once the pipeline is that


def render_dataset(number: int, seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """Render training scenes: images [N, 3, 64, 64] in [-1, 1] (the VAE's range) and what they show."""
    rng = random.Random(seed)
    drawn = list(islice(scenes(seed, held_out=False), number))
    pixels = np.stack([np.asarray(render(scene, rng, RESOLUTION)) for scene in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, drawn


def told(drawn: list[Scene], share: float, seed: int) -> list[str]:
    """Return a caption of every scene, in which each attribute is wrong with probability `share`."""
    rng = random.Random(seed)
    return [confuse(scene, rng, share).caption() for scene in drawn]


class TextToLatent(torch.nn.Module):
    """Text encoders and denoiser as one module, so that one optimiser and one moving average cover both."""

    def __init__(self, pipeline: DiffusionPipeline):
        """Share the pipeline's modules, all of which are to be trained."""
        super().__init__()
        self.backbone = family_of(type(pipeline).__name__, "the pipeline").over(pipeline, "the pipeline")
        self.encoders = torch.nn.ModuleList(self.backbone.text_encoders).requires_grad_(True)
        self.denoiser = self.backbone.denoiser.requires_grad_(True)

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


@dataclass(frozen=True)
class Stage:
    """Say what one training of a denoiser learns, and for how long."""

    captions: list[str]
    steps: int
    learning_rate: float
    number: int  # every stage of a recipe draws other noise


def train_denoiser(
    pipeline: DiffusionPipeline, x0: torch.Tensor, recipe: Pretraining, console: Console, stage: Stage
) -> tuple[float, dict[str, torch.Tensor]]:
    """Train text encoders and denoiser on scaled latents [N, C, 16, 16] and keep their average.

    Returns:
        The last error, and the weights that the average had at the early step (or the last, if that comes before).
    """
    model, seed = TextToLatent(pipeline).train(), recipe.seed + 10 * stage.number
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, weight_decay=1e-3, fused=True)
    schedule, generator = one_cycle(optimizer, stage.steps), torch.Generator().manual_seed(seed + 1)
    smoothed, early = None, {}
    with Progress("denoiser, step", stage.steps, console=console) as shown:
        for number, index in enumerate(batches(len(x0), recipe.denoiser_batch_size, stage.steps, seed + 2), start=1):
            noised = _noised(model.backbone, x0[index], generator)
            dropped = torch.rand(len(index), generator=generator) < recipe.caption_dropout
            rows = ["" if blank else stage.captions[i] for i, blank in zip(index.tolist(), dropped, strict=True)]
            error = _step(model, noised, rows, optimizer, bf16=recipe.denoiser_bf16)
            schedule.step()
            average.update_parameters(model)
            if number == min(recipe.early_step, stage.steps):
                early = {name: weight.clone() for name, weight in average.module.state_dict().items()}
            smoothed = error if smoothed is None else 0.98 * smoothed + 0.02 * error
            shown.advance(note=f"error {smoothed:.4f}")
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return smoothed, early


def _step(
    model: TextToLatent,
    noised: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    captions: list[str],
    optimizer: torch.optim.Optimizer,
    *,
    bf16: bool,
) -> float:
    """Take one optimizer step and return its error."""
    xt, wanted, timesteps = noised
    # The fused attention's backward in bfloat16 takes a third of the step on a CPU; of so few tokens, plain is faster.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH) if bf16 else nullcontext():
        loss = functional.mse_loss(model(xt, timesteps, captions).float(), wanted)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def pretrain(pipeline: DiffusionPipeline, recipe: Pretraining, console: Console, keep: Keep) -> dict[str, float]:
    """Train the whole pipeline in place, to the strong generator; return the final errors of its parts.

    `keep` is called with "early", "base" and "strong" when the pipeline is that.
    """
    images, drawn = render_dataset(recipe.images, recipe.seed)
    errors = {"vae_error": train_vae(pipeline.vae, images, recipe, console)}
    x0, captions = scaled_latents(pipeline.vae, images), told(drawn, recipe.wrong_captions, recipe.seed + 4)
    errors["decoder_error"] = train_decoder(pipeline.vae, images, recipe, console)
    true, known = [scene.caption() for scene in drawn], (pipeline, x0, recipe, console)
    if recipe.epsilon_steps:
        own, pipeline.scheduler = pipeline.scheduler, build_epsilon_scheduler()
        errors["epsilon_error"], _ = train_denoiser(
            *known, Stage(true, recipe.epsilon_steps, recipe.epsilon_learning_rate, 0)
        )
        pipeline.scheduler = own
    stage = Stage(captions, recipe.denoiser_steps, recipe.denoiser_learning_rate, 1)
    errors["denoising_error"], early = train_denoiser(*known, stage)
    model = TextToLatent(pipeline)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, weights in (("early", early), ("base", base)):
        model.load_state_dict(weights)
        keep(name)
    errors["strong_error"], _ = train_denoiser(*known, Stage(true, recipe.strong_steps, recipe.strong_learning_rate, 2))
    keep("strong")
    return errors


def scaled_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return what a denoiser learns from, [N, C, 16, 16] of unit variance."""
    return (encode(vae, images) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
