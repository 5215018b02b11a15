"""`diffalign.generate`."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

from PIL import Image

from diffalign.api.common import PathLike, Seeds, kept_in, telling, worded
from diffalign.evaluation import Manifest, SamplingSettings, comparison_grid
from diffalign.evaluation.scoring import open_image
from diffalign.jobs.drawing import generate as job
from diffalign.jobs.drawing.negative import Negative
from diffalign.jobs.drawing.prompts import is_prompt_file

SHOWN = (8, 4)  # prompts and pictures of each, in a notebook


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pictures(Sequence[Image.Image]):
    """Hold pictures in memory, those of the first prompt first; each knows its prompt and seed."""

    images: list[Image.Image]
    prompts: list[str]  # one a picture, and so are the seeds
    seeds: list[int]
    folder: Path | None = None  # where they are kept

    @classmethod
    def of(cls, manifest: Manifest, folder: Path | None) -> Self:
        """Read the pictures of a manifest."""
        seeds = manifest.table["seed"].tolist()
        return cls(images=list(map(open_image, manifest.paths)), prompts=manifest.prompts, seeds=seeds, folder=folder)

    def figure(self) -> Image.Image:
        """Return a sheet of the first pictures, prompts down and seeds across."""
        down, across = SHOWN
        prompts = list(dict.fromkeys(self.prompts))[:down]
        seeds = list(dict.fromkeys(self.seeds))[:across]
        known = dict(zip(zip(self.prompts, self.seeds, strict=True), self.images, strict=True))
        rows = [[known[prompt, seed] for seed in seeds] for prompt in prompts]
        return comparison_grid([""] * len(rows), [f"seed {seed}" for seed in seeds], rows, prompts)

    def _repr_png_(self) -> bytes:
        """Show the sheet in a notebook."""
        return self.figure()._repr_png_()

    def __repr__(self) -> str:
        kept = f" in {self.folder}" if self.folder else ""
        return f"<{len(self)} pictures of {len(set(self.prompts))} prompts{kept}>"

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self.images[index]


def generate(
    model: PathLike,
    prompts: PathLike | Sequence[str],
    *,
    seeds: Seeds = "0",
    limit: int | None = None,
    out: PathLike | None = None,
    base: str | None = None,
    steps: int = 30,
    guidance_scale: float = 5.0,
    negative_prompt: str = "",
    long_prompts: str = "truncate",
    negative_lora: PathLike | None = None,
    negative_scale: float = 1.0,
    policy_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> Pictures:
    """Draw prompts with a model.

    Every picture has its own generator, so it can be drawn again alone, in whatever batch.

    Args:
        model: a hub id, folder, .safetensors file, LoRA or training run, as a path or as `train` returned it.
        prompts: a prompt, a list of them, or a file: one a line of .txt, or a table.
        seeds: of every prompt: 0, [0, 3, 7] or "0-3".
        limit: use only the first so many prompts.
        out: a folder for PNG files and their manifest; what it holds already is not drawn again. None keeps no files.
        base: the model that a LoRA or UNet goes on, if not the one it names.
        steps: denoising steps, with the model's own scheduler.
        guidance_scale: 7.5 is usual for SD1.5, 5.0 for SDXL; 1 switches guidance off (of Z-Image, 0).
        negative_prompt: what the pictures should not show.
        long_prompts: "truncate", or "chunk": CLIP reads prompts as a whole, 75 tokens at a time (SD1.5, SDXL).
        negative_lora: Diffusion-NPO: a LoRA, UNet or run that draws the unconditional branch of guidance.
        negative_scale: how much of it is in that branch.
        policy_scale: how much of the model's own training is in that branch.
        height: pixels; by default what the model was made for, and so is `width`.
        batch_size: pictures at a time; does not change them.
        dtype: "auto" (bfloat16 on a GPU, else float32), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        quiet: say nothing and show no progress.

    Raises:
        UserError: no such model or prompts, settings nothing can be drawn with, a folder that holds other pictures.

    Example:
        pictures = diffalign.generate("runs/first", ["a red circle on a blue background"], seeds=[0, 1])
        pictures[0].save("first.png")
    """
    is_file = not isinstance(prompts, Iterable) or (isinstance(prompts, str) and is_prompt_file(prompts))
    given = (os.fspath(prompts), None) if is_file else (None, [prompts] if isinstance(prompts, str) else list(prompts))
    texts, numbers = job.read_request(*given, worded(seeds), limit)
    settings = SamplingSettings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        long_prompts=long_prompts,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    negative = Negative.of(negative_lora and os.fspath(negative_lora), negative_scale, policy_scale)
    what = {"base": base, "negative": negative, "torch_dtype": dtype, "device": device}
    with kept_in(out) as folder, telling(quiet, messages=out is not None) as console:
        manifest = job.generate(os.fspath(model), texts, numbers, folder, settings, **what, console=console)
        return Pictures.of(manifest, None if out is None else folder)
