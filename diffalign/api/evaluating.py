"""`diffalign.evaluate`."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from diffalign.api.common import PathLike, Scorers, Seeds, kept_in, listed, telling, worded
from diffalign.evaluation import Evaluation, Manifest, SamplingSettings
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.evaluation.results import Bootstrap
from diffalign.jobs.drawing import prompt_sets
from diffalign.jobs.drawing.prompts import parse_seeds
from diffalign.jobs.evaluating import evaluate as job
from diffalign.jobs.scoring.own_pictures import compared_as_they_are


def evaluate(
    models: PathLike | Sequence[PathLike],
    *,
    prompts: PathLike | Sequence[str] | None = None,
    scorers: Scorers = (),
    out: PathLike | None = None,
    protocol: str | None = None,
    judge: str = "oracle",
    seeds: Seeds = "0",
    noise: str = "own",
    limit: int | None = None,
    baseline: str | None = None,
    base: str | None = None,
    show_base: bool = False,
    steps: int = 30,
    guidance_scale: float = 5.0,
    negative_prompt: str = "",
    long_prompts: str = "truncate",
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    resamples: int = 10_000,
    gallery: int = 96,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
) -> Evaluation:
    """Compare models on prompts: the same noise for all, all scorers, paired statistics over prompts, a report.

    Args:
        models: each a hub id, folder, .safetensors file, LoRA or training run, or pictures that `generate` kept; as a
            path, as `train` returned it, or named: "dpo=runs/demo". Without prompts: folders of pictures of your own.
        prompts: a list; "embedded"; a file; or a published set as on the command line, "parti=PartiPrompts.tsv". None
            compares the pictures of equal names in the folders that `models` are.
        scorers: "pickscore,hpsv2.1,oracle" or a list; own weights: "pickscore=assets/tiny-pickscore".
        out: a folder for pictures, scores, summary.md and report.html. Called again, only missing pictures are drawn.
            None keeps no files.
        protocol: a benchmark's rules: "geneval", "dpg" or "hps".
        judge: of geneval and dpg: "oracle" (the embedded world), or "module:Name" of a detector or answerer.
        seeds: pictures of every prompt: 0, [0, 3, 7] or "0-3".
        noise: "own": every prompt draws from other noise; "shared": as `generate`.
        limit: use only the first so many prompts.
        baseline: which model the others are compared with, by its name; by default the first.
        base: the model that LoRAs and UNets go on, if not the one they name.
        show_base: add the base of the first LoRA or UNet, in front.
        steps: denoising steps; it and all down to `batch_size` are as of `generate`, and so are dtype and device.
        resamples: of the bootstrap over prompts.
        gallery: pairs of pictures the report shows at most.
        quiet: say nothing and show no progress.

    Raises:
        UserError: models, prompts or scorers that do not exist or do not go together.

    Example:
        result = diffalign.evaluate("runs/first", prompts="embedded", scorers="oracle", show_base=True, out="out/first")
        result.table[["model", "scorer", "win_rate", "ci_low", "ci_high"]]
    """
    settings = SamplingSettings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        long_prompts=long_prompts,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    named = list(map(os.fspath, [models] if isinstance(models, str | os.PathLike) else models))
    with kept_in(out) as folder, telling(quiet, messages=out is not None) as console:
        prompt_set, own = _asked(named, prompts, folder, limit, console)
        request = job.Request(
            specs=named,
            own=own,
            prompts=prompt_set,
            seeds=parse_seeds(worded(seeds)),
            scorers=listed(scorers),
            out=folder,
            settings=settings,
            baseline=baseline,
            base=base,
            show_base=show_base,
            noise=noise,
            bootstrap=Bootstrap(resamples=resamples),
            gallery_size=gallery if out is not None else 0,
            protocol=protocol,
            judge=judge,
            torch_dtype=dtype,
            device=device,
        )
        return job.evaluate(request, console=console)


def _asked(
    named: list[str], prompts: PathLike | Sequence[str] | None, out: Path, limit: int | None, console: Console
) -> tuple[PromptSet, dict[str, Manifest] | None]:
    """Return the prompts, and the pictures if they are there already."""
    if prompts is None:
        return compared_as_they_are(named, out, limit, console)
    if isinstance(prompts, str | os.PathLike):
        return prompt_sets.open_prompt_set(os.fspath(prompts), limit), None
    return prompt_sets.listed("prompts", prompts).head(limit), None
