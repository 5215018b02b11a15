"""`diffalign rollout`: draw the pictures of a run's trajectories for people to judge."""

from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from rich.console import Console

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.evaluation import Manifest
from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training import human_labels, networks, online
from diffalign.jobs.training.assemble import load_backbone
from diffalign.jobs.training.train import make_accelerator
from diffalign.progress import progress_bar
from diffalign.rollout import PromptEncoder
from diffalign.rollout.scoring import pictures
from diffalign.rollout.trajectories import walk


def rollout(config: Config, out: Path, console: Console) -> list[Manifest]:
    """Draw rollout.samples_per_prompt pictures of every prompt, each into a folder of its own.

    Interrupted, it goes on where it stopped; more prompts extend the folders.

    Raises:
        ConfigError: the configuration compares no pictures of one prompt.
        DataError: the folders hold pictures of other weights or settings.
    """
    count, accelerator = human_labels.copies(config), make_accelerator(config)
    backbone = load_backbone(config)
    settings, identity = human_labels.drawn_with(config, backbone)
    texts = list(dict.fromkeys(read_prompts(config.data.prompts_file, config.data.max_train_samples)))
    table = pd.DataFrame({"prompt_id": range(len(texts)), "prompt": texts, "seed": config.train.seed})
    folders = [human_labels.folder(out, copy) for copy in range(count)]
    manifests = [Manifest.plan(folder, table, settings=settings, identity=identity) for folder in folders]
    _draw(config, backbone, accelerator, texts, manifests)
    console.print(
        f"{count} pictures of {len(texts)} prompts in {out}. Let people judge them:\n"
        f"diffalign label {' '.join(map(str, folders))} --votes {out / human_labels.VOTES}\n"
        f"and train with rollout.scorer={human_labels.LABELS}={out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return manifests


@torch.no_grad()
def _draw(
    config: Config, backbone: Backbone, accelerator: Accelerator, texts: list[str], manifests: list[Manifest]
) -> None:
    """Sample the trajectories that are not drawn yet, as the run will, and keep where they end."""
    device, encode = accelerator.device, PromptEncoder(backbone, config.data.resolution)
    networks.place(config, backbone, device)
    backbone.offload_encoders(device)
    sampler = online.make_sampler(config, backbone)
    todo = [row for row in range(len(texts)) if not all(manifest.paths[row].exists() for manifest in manifests)]
    size = max(1, config.rollout.sample_batch_size // len(manifests))
    with progress_bar(len(todo), "Drawing", accelerator.is_main_process) as advance:
        for start in range(0, len(todo), size):
            rows = todo[start : start + size]
            prompts = encode([texts[row] for row in rows], device)
            with accelerator.autocast():
                ends = walk(sampler, prompts, human_labels.STEP, len(manifests), config.shared_noise)[0][-1]
            for manifest, part in zip(manifests, ends.chunk(len(manifests)), strict=True):
                drawn = [image for few in part.split(config.rollout.decode_batch_size)
                         for image in pictures(backbone.decode_latents(few))]  # fmt: skip
                for row, image in zip(rows, drawn, strict=True):
                    with atomic_write(manifest.paths[row]) as temporary:
                        image.save(temporary, format="PNG")
            advance(len(rows))
