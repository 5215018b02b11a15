"""Commands that draw and judge pictures: generate, grid, score."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.errors import UserError

MODEL_HELP = "A hub id, folder, .safetensors file, LoRA, or training run such as runs/demo. dpo=runs/demo names it dpo."
SCORERS_HELP = "Scorers: pickscore,hpsv2.1,oracle. Own weights: pickscore=assets/tiny-pickscore."

PromptFile = Annotated[Path | None, typer.Option(help="A text file with one prompt a line, or a table (csv, parquet).")]
PromptTexts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")]
Seeds = Annotated[str, typer.Option(help="Seeds of every prompt: 0, 0,3,7 or 0-3 (both ends included).")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many.")]
Base = Annotated[str | None, typer.Option(help="The model that LoRAs and UNets go on, if not the one they name.")]
Steps = Annotated[int, typer.Option(help="Denoising steps, with the model's own scheduler.")]
Guidance = Annotated[float, typer.Option(help="7.5 is usual for SD1.5, 5.0 for SDXL; 1 switches guidance off.")]
NegativePrompt = Annotated[str, typer.Option(help="What the pictures should not show.")]
NegativeLora = Annotated[
    str | None, typer.Option(help="Diffusion-NPO: a LoRA, UNet or run that draws the unconditional branch of guidance.")
]
NegativeScale = Annotated[float, typer.Option(help="How much of --negative-lora is in that branch.")]
PolicyScale = Annotated[float, typer.Option(help="How much of MODEL's own training is in that branch.")]
Height = Annotated[int | None, typer.Option(help="Pixels; by default what the model was made for.")]
Width = Annotated[int | None, typer.Option(help="Pixels; by default what the model was made for.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")]
BatchSize = Annotated[int, typer.Option(help="Pictures at a time; does not change them.")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their manifest.")],
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    seeds: Seeds = "0",
    limit: Limit = None,
    base: Base = None,
    steps: Steps = 30,
    guidance_scale: Guidance = 5.0,
    negative_prompt: NegativePrompt = "",
    negative_lora: NegativeLora = None,
    negative_scale: NegativeScale = 1.0,
    policy_scale: PolicyScale = 1.0,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Draw prompts into a folder: lossless PNG files and a manifest that says which shows what.

    Every picture has its own generator, so it can be drawn again alone. Run again, the command goes on where it was
    interrupted; a longer prompt list or more seeds extend the folder.

    Example: `diffalign generate runs/demo --prompts assets/prompts/tiny-held-out.txt --seeds 0-3 --out out/demo`

    Example: `diffalign generate runs/dpo --negative-lora runs/npo --prompt "a red circle" --out out/dpo-npo`
    """
    from diffalign.jobs import generate as job
    from diffalign.jobs.negative import Negative

    texts, numbers = job.read_request(prompts, prompt, seeds, limit)
    settings = sampling(steps, guidance_scale, negative_prompt, height, width, batch_size)
    options = {"base": base, "negative": Negative.of(negative_lora, negative_scale, policy_scale)}
    job.generate(model, texts, numbers, out, settings, **options, torch_dtype=dtype, device=device, console=Console())


def grid(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The figure: .png, .jpg or .webp.")] = Path("grid.png"),
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    seeds: Seeds = "0",
    limit: Limit = None,
    scorers: Annotated[list[str] | None, typer.Option("--with", help=SCORERS_HELP)] = None,
    base: Base = None,
    show_base: Annotated[bool, typer.Option("--show-base", help="Add the base of the first LoRA or UNet.")] = False,
    title: Annotated[str, typer.Option(help="Set above the figure.")] = "",
    steps: Steps = 30,
    guidance_scale: Guidance = 5.0,
    negative_prompt: NegativePrompt = "",
    negative_lora: NegativeLora = None,
    negative_scale: NegativeScale = 1.0,
    policy_scale: PolicyScale = 1.0,
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Draw one figure: prompts and seeds down, models across, from the same noise, with scores below each picture.

    LoRAs and UNets of one base model load it once. --negative-lora holds for all columns.

    Example: `diffalign grid runs/dpo runs/mapo --show-base --prompt "a red circle" --seeds 0-3 --with pickscore`
    """
    from diffalign.jobs import generate as request
    from diffalign.jobs.grid import grid as run
    from diffalign.jobs.negative import Negative

    texts, numbers = request.read_request(prompts, prompt, seeds, limit)
    settings = sampling(steps, guidance_scale, negative_prompt, height, width, batch_size)
    options = {"base": base, "show_base": show_base, "scorers": scorers or (), "title": title}
    options["negative"] = Negative.of(negative_lora, negative_scale, policy_scale)
    run(models, texts, numbers, out, settings, **options, torch_dtype=dtype, device=device, console=Console())


def score(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGES]...", help="Files, folders, globs.")] = None,
    scorers: Annotated[list[str] | None, typer.Option("--with", help=SCORERS_HELP)] = None,
    out: Annotated[Path, typer.Option(help="The scores: .parquet, .csv or .jsonl.")] = Path("scores.parquet"),
    prompts: Annotated[Path | None, typer.Option(help="One prompt a picture, in the order of their names.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Score preference pairs instead: parquet, .jsonl, w/ and l/, or a hub data set.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the pairs.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many pairs.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="List and leave out broken pictures.")] = False,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    device: Device = "auto",
) -> None:
    """Score pictures for their prompts, or preference pairs.

    A folder drawn by `diffalign generate` knows its prompts; other pictures need --prompts or --prompt. For pairs the
    table says how often each scorer agrees with people, and with what probability it prefers the chosen image.

    Example: `diffalign score out/base out/dpo --with pickscore,hpsv2.1 --out scores.csv`

    Example: `diffalign score --pairs assets/tiny-pairs --with oracle,pickscore=assets/tiny-pickscore`
    """
    from diffalign.jobs import score as job

    _check_scoring(images, pairs, prompts is not None or prompt is not None, split, limit, batch_size)
    common = {"skip_broken": skip_broken, "batch_size": batch_size, "device": device, "console": Console()}
    if pairs:
        job.score_pairs(pairs, out, scorers or [], split=split, limit=limit, **common)
    else:
        job.score_images(images, out, scorers or [], prompts_file=prompts, prompt=prompt, **common)


def sampling(steps: int, guidance_scale: float, negative_prompt: str, height, width, batch_size: int):
    """Return the settings that options of drawing commands say."""
    from diffalign.evaluation import SamplingSettings

    return SamplingSettings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        batch_size=batch_size,
    )


def _check_scoring(images, pairs, has_prompts: bool, split: str, limit: int | None, batch_size: int) -> None:
    if bool(images) == bool(pairs):
        got = "both" if images else "neither"
        raise UserError(f"Give IMAGES (files, folders, globs) or --pairs SOURCE; got {got}.")
    if pairs and has_prompts:
        raise UserError("Pairs carry their prompts: leave out --prompts and --prompt.")
    if images and (split != "train" or limit is not None):
        raise UserError("--split and --limit belong to --pairs: leave them out, or name fewer IMAGES.")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (generate, grid, score):
        app.command()(command)
