"""Grids drawn while training: the base model beside the policy as it is, from the same noise."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.errors import ConfigError
from diffalign.evaluation import SamplingSettings, comparison_grid, generate, save_grid
from diffalign.evaluation.fonts import missing_glyphs
from diffalign.jobs.drawing.prompts import is_prompt_file, read_prompts
from diffalign.training.sharding import is_sharded


def drawer(config: Config, backbone: Backbone, accelerator: Accelerator) -> Callable[[nn.Module, int], None] | None:
    """Return what draws a grid every `validation_steps` steps, or None if no grids are wanted.

    Raises:
        ConfigError: steps without prompts.
    """
    wanted = config.validation
    if wanted.validation_steps is None:
        return None
    if not wanted.validation_prompts:
        raise ConfigError("validation.validation_steps needs validation.validation_prompts: a list, or a text file.")
    prompts = _prompts(wanted.validation_prompts)
    if lacking := missing_glyphs(None, prompts):
        accelerator.print(lacking)
    settings = SamplingSettings(
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        long_prompts=config.data.long_prompts,
        batch_size=4,
    )
    # A network that runs in bfloat16 without autocast has encoders and a decoder of other dtypes beside it.
    mixed = partial(torch.autocast, accelerator.device.type, torch.bfloat16)
    precision = mixed if config.pure_bf16 else accelerator.autocast
    rows = [(prompt, seed) for prompt in prompts for seed in wanted.seeds]

    def sample(denoiser: nn.Module) -> list:
        training = denoiser.training
        denoiser.eval()
        backbone.offload_encoders(accelerator.device)
        with torch.no_grad(), precision():
            images = generate(backbone.pipeline(), *zip(*rows, strict=True), settings, progress=False)
        backbone.offload_encoders("cpu")
        denoiser.train(training)
        return images

    # Before the first step, and before a checkpoint is restored, the policy still is the base.
    base = sample(backbone.denoiser) if accelerator.is_main_process else []

    def draw(policy: nn.Module, step: int) -> None:
        if step % wanted.validation_steps or not (accelerator.is_main_process or is_sharded(policy)):
            return
        images = sample(policy)
        if not accelerator.is_main_process:
            return
        grid = comparison_grid(
            [f"seed {seed}" for _, seed in rows],
            ["base", f"step {step}"],
            list(zip(base, images, strict=True)),
            [prompt for prompt, _ in rows],
        )
        save_grid(grid, Path(config.train.output_dir) / "validation" / f"step-{step:06d}.png")
        send(grid, step, accelerator)

    return draw


def _prompts(given: list[str] | str) -> list[str]:
    """Return the prompts of a list, of a file, or the one that a text is that names no file."""
    if isinstance(given, list):
        return given
    return read_prompts(given) if is_prompt_file(given) or Path(given).is_file() else [given]


def send(grid: Image.Image, step: int, accelerator: Accelerator) -> None:
    """Hand a grid to the trackers of a run."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({"validation": [grid]}, step=step)
