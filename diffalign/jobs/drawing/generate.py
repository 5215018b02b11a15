"""`diffalign generate`: draw prompts with one model into a folder of pictures and a manifest."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from diffalign.errors import DataError
from diffalign.evaluation import Manifest, SamplingSettings, generate_to
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.negative import Negative, loader
from diffalign.jobs.drawing.prompts import parse_seeds, read_prompts
from diffalign.text_files import well_formed

LARGEST_SEED = 2**63 - 1


def read_request(
    prompts_file: str | Path | None, prompts: Sequence[str] | None, seeds: str, limit: int | None = None
) -> tuple[list[str], list[int]]:
    """Return the prompts and the seeds that a command line asks for.

    Raises:
        DataError: no prompts, prompts from two places, or seeds that are none.
    """
    if bool(prompts_file) == bool(prompts):
        got = "both" if prompts else "neither"
        raise DataError(f'Give the prompts either by --prompts FILE or by --prompt "TEXT"; got {got}.')
    texts = read_prompts(prompts_file) if prompts_file else [well_formed(text.strip()) for text in prompts]
    if not all(texts):
        raise DataError('--prompt is empty. Write what the picture shows, e.g. --prompt "a red circle".')
    if limit is not None and limit < 1:
        raise DataError(f"--limit must be at least 1, got {limit}.")
    numbers = parse_seeds(seeds)
    if max(numbers) > LARGEST_SEED:
        raise DataError(f"A seed lies between 0 and 2**63 - 1, got {max(numbers)}.")
    if len(set(numbers)) < len(numbers):
        raise DataError(f'The seeds "{seeds}" repeat one: every picture of a prompt needs another.')
    return texts[:limit], numbers


def generate(
    spec: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    settings: SamplingSettings,
    *,
    base: str | None = None,
    negative: Negative | None = None,
    torch_dtype: str = "auto",
    device: str = "auto",
    console: Console,
) -> Manifest:
    """Draw every prompt with every seed; what the folder holds already is not drawn again.

    The number of a prompt is its position in `prompts`, so a list may grow at its end.
    """
    wanted = models.resolve([spec], base, base_is_used=negative is not None)
    if negative is not None:
        negative.check(settings.guidance_scale, wanted)
    model = loader(negative, base, torch_dtype, device).load(wanted[0])
    ids = [index for index in range(len(prompts)) for _ in seeds]
    texts = [prompt for prompt in prompts for _ in seeds]
    manifest = generate_to(
        out, model.pipeline, texts, list(seeds) * len(prompts), settings, identity=model.identity, prompt_ids=ids
    )
    console.print(
        f"{len(manifest.paths)} pictures of {len(prompts)} prompts by {model.name} in {out}. "
        f"Score them: diffalign score {out} --with pickscore",
        markup=False,
        highlight=False,
    )
    return manifest
