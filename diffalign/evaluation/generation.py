"""Draw pictures through a diffusers pipeline, reproducibly and resumably."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.backbones.base import Backbone
from diffalign.backbones.families import has_unconditional_branch, pipeline_kind
from diffalign.backbones.starting import initial_noise
from diffalign.errors import DataError, ModelError, UserError
from diffalign.evaluation.drawing_order import drawing_order, is_whole_png
from diffalign.evaluation.manifest import Manifest, atomic_write
from diffalign.folder_lock import held
from diffalign.progress import progress_bar

LATENT_SCALING = ("scaling_factor", "latents_mean", "latents_std")  # in a VAE's configuration


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """State how pictures are drawn; everything but `batch_size` changes what is drawn."""

    num_inference_steps: int = 30  # >= 1, with the scheduler of the pipeline
    guidance_scale: float = 5.0  # >= 0; 7.5 is usual for SD 1.5 and 5.0 for SDXL; <= 1 switches guidance off
    negative_prompt: str = ""  # "" is the pipeline's own default, which SDXL takes to mean zeroed embeddings
    height: int | None = None  # pixels; None: what the denoiser was made for
    width: int | None = None
    long_prompts: str = "truncate"  # or "chunk": CLIP reads them as a whole, 75 tokens at a time
    batch_size: int = 8  # pictures at a time; halved when memory runs out

    def __post_init__(self) -> None:
        """Raise UserError for values no pipeline can draw with."""
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.guidance_scale >= 0:
            raise UserError(f"guidance_scale must be at least 0, got {self.guidance_scale}. 5 to 7.5 is usual.")
        if self.long_prompts not in ("truncate", "chunk"):
            raise UserError(f'long_prompts must be "truncate" or "chunk", got "{self.long_prompts}".')
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size < 8 or size % 8):
                raise UserError(
                    f"{name} must be a positive multiple of 8, got {size}. Try {max(8, round(size / 8) * 8)}."
                )


def prompt_plan(
    prompts: Sequence[str], images_per_prompt: int = 1, seed: int = 0
) -> tuple[list[int], list[str], list[int]]:
    """Return (prompt_ids, prompts, seeds), one entry a picture, with another seed for every picture.

    One seed for all prompts would give them all the same noise: what that noise happens to favour would look like a
    property of the model, and resampling prompts would not see it.
    """
    ids = [index for index in range(len(prompts)) for _ in range(images_per_prompt)]
    return ids, [prompts[index] for index in ids], [seed + position for position in range(len(ids))]


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    progress: bool = True,
) -> list[Image.Image]:
    """Return one picture per prompt and seed.

    Every picture has its own CPU generator, so up to float rounding it is what
    `pipeline(prompt, generator=torch.Generator().manual_seed(seed), ...)` draws, whatever the batch size.

    Raises:
        DataError: for prompts and seeds that do not match.
        ModelError: for a safety checker, values that are not finite or too little memory for one picture.
    """
    settings = settings or SamplingSettings()
    return [image for batch in _batches(pipeline, prompts, seeds, settings, progress) for image in batch]


def generate_to(
    directory: str | Path,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    identity: str,
    prompt_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> Manifest:
    """Draw pictures into a folder of PNG files and return its manifest; finished pictures are not drawn again.

    A picture that is damaged is; the folder is this command's own meanwhile.

    Args:
        directory: made if missing. A folder drawn before may be extended by new prompts and seeds.
        identity: what the pictures depend on besides the settings: the model, best with a fingerprint of its weights.
        prompt_ids: pictures with the same id count as one prompt; by default those with the same text.

    Raises:
        DataError: if the folder holds pictures of another model, other settings or other prompts; on a full disk.
    """
    settings = settings or SamplingSettings()
    _check_request(pipeline, prompts, seeds)
    _check_texts(pipeline, settings)
    ids = pd.factorize(pd.Series(prompts, dtype=object))[0] if prompt_ids is None else prompt_ids
    if len(ids) != len(prompts):
        raise DataError(f"Got {len(prompts)} prompts but {len(ids)} prompt ids: every picture needs one of each.")
    requested = pd.DataFrame({"prompt_id": list(map(int, ids)), "prompt": list(prompts), "seed": list(map(int, seeds))})
    requested["noise"] = [str(initial_noise(pipeline, int(s), settings.height, settings.width)) for s in seeds]
    with held(directory):
        manifest = Manifest.plan(directory, requested, settings=_drawing_record(pipeline, settings), identity=identity)
        _draw_missing(pipeline, manifest, prompts, seeds, settings, progress)
    return manifest


def _draw_missing(
    pipeline: DiffusionPipeline,
    manifest: Manifest,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    progress: bool,
) -> None:
    """Draw what a folder lacks, in the batches of a run that was interrupted: the same pictures to the bit."""
    with drawing_order(manifest, settings.batch_size) as todo:
        drawn = _batches(pipeline, [prompts[row] for row in todo], [seeds[row] for row in todo], settings, progress)
        waiting = iter(todo)
        for batch in drawn:
            for image in batch:
                path = manifest.paths[next(waiting)]
                if not is_whole_png(path):
                    with atomic_write(path) as temporary:
                        image.save(temporary, format="PNG")


def _batches(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    progress: bool,
) -> Iterator[list[Image.Image]]:
    _check_request(pipeline, prompts, seeds)
    _check_texts(pipeline, settings)
    size = settings.batch_size
    with _quiet(pipeline), progress_bar(len(prompts), "Drawing", progress) as advance:
        start = 0
        while start < len(prompts):
            chosen = slice(start, start + size)
            try:
                images = _draw(pipeline, prompts[chosen], seeds[chosen], settings)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ModelError("Memory ran out drawing a single picture. Draw smaller or in bfloat16.") from error
                size = max(1, size // 2)
                continue
            yield images
            start += len(images)
            advance(len(images))


@torch.no_grad()
def _draw(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> list[Image.Image]:
    kind = pipeline_kind(pipeline)
    arrays = pipeline(
        num_inference_steps=settings.num_inference_steps,
        **_text_arguments(kind, pipeline, list(prompts), settings),
        **kind.drawing_options(pipeline),
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
        output_type="np",
    ).images
    # The pipeline's own conversion would turn NaN into black pictures without a word.
    bad = ~np.isfinite(arrays).reshape(len(arrays), -1).all(axis=1)
    if bad.any():
        raise ModelError(
            f"The picture for {prompts[int(bad.argmax())]!r} is not finite. In float16 the SDXL VAE overflows: "
            'use bfloat16, float32 or the VAE "madebyollin/sdxl-vae-fp16-fix"; otherwise the model has diverged.'
        )
    return pipeline.numpy_to_pil(arrays)


def _text_arguments(
    kind: type[Backbone], pipeline: DiffusionPipeline, prompts: list[str], settings: SamplingSettings
) -> dict[str, Any]:
    """Return what a pipeline is told of prompts and of guidance."""
    scale, negative = settings.guidance_scale, settings.negative_prompt
    if settings.long_prompts == "chunk":
        return {"guidance_scale": scale, **kind.long_prompt_arguments(pipeline, prompts, negative)}
    return {"prompt": prompts, **kind.guidance_arguments(pipeline, scale, negative, len(prompts))}


def _check_request(pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise DataError(f"Got {len(prompts)} prompts but {len(seeds)} seeds: every picture needs one of each.")
    if getattr(pipeline, "safety_checker", None) is not None:
        raise ModelError(
            "The pipeline has a safety checker, which blacks out pictures and falsifies every score. "
            "Load it with safety_checker=None, requires_safety_checker=False."
        )


def _check_texts(pipeline: DiffusionPipeline, settings: SamplingSettings) -> None:
    if fault := pipeline_kind(pipeline).long_prompts_fault(settings.long_prompts):
        raise UserError(f"--long-prompts {fault}")
    if settings.negative_prompt and not has_unconditional_branch(pipeline):
        raise UserError(
            f"A {type(pipeline).__name__} is told its guidance_scale and predicts nothing without a prompt: a negative "
            "prompt has no effect on its pictures. Leave --negative-prompt out."
        )


@contextmanager
def _quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Silence the pipeline's bar over its steps for the time of the context."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _drawing_record(pipeline: DiffusionPipeline, settings: SamplingSettings) -> dict[str, Any]:
    """Return what two models must share for their pictures to be comparable: all but weights and batch size."""
    record = asdict(settings)
    del record["batch_size"]
    if settings.long_prompts == "truncate":  # as before there was a choice
        del record["long_prompts"]
    scheduler, vae = pipeline.scheduler, pipeline.vae
    record["pipeline"] = type(pipeline).__name__
    record["dtype"] = str(pipeline.dtype).removeprefix("torch.")
    scaling = {name: vae.config[name] for name in LATENT_SCALING if vae.config.get(name) is not None}
    record["vae"] = {"dtype": str(vae.dtype).removeprefix("torch.")} | scaling
    record["scheduler"] = {"class": type(scheduler).__name__} | {
        key: value for key, value in scheduler.config.items() if not key.startswith("_")
    }
    return record
