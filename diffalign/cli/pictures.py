"""Commands that draw pictures: generate, grid."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    out: Annotated[Path, typer.Option(help="The figure: .png, .jpg, .webp or .pdf.")] = Path("grid.png"),
    prompts: PromptFile = None,
    prompt: PromptTexts = None,
    seeds: Seeds = "0",
    limit: Limit = None,
    scorers: Annotated[list[str] | None, typer.Option("--with", help=SCORERS_HELP)] = None,
    base: Base = None,
    show_base: Annotated[bool, typer.Option("--show-base", help="Add the base of the first LoRA or UNet.")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Columns are the checkpoints of the runs.")
    ] = False,
    sweep: Annotated[
        str | None, typer.Option(help="Columns are guidance_scale=1,3,5, steps=... or lora_scale=0,1.")
    ] = None,
    title: Annotated[str, typer.Option(help="Set above the figure.")] = "",
    cell: Annotated[int | None, typer.Option(help="Side of a picture in pixels, 64 or more.")] = None,
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light",
    font: Annotated[Path | None, typer.Option(help="A TrueType file, for scripts that DejaVu Sans lacks.")] = None,
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

    LoRAs and UNets of one base model load it once. --negative-lora holds for all columns. A figure of many rows is
    written in pages: of one PDF, or grid-1.png, grid-2.png, ...

    Example: `diffalign grid runs/dpo runs/mapo --show-base --prompt "a red circle" --seeds 0-3 --with pickscore`

    Example: `diffalign grid runs/dpo --checkpoints --prompts p.txt --out grid.pdf`

    Example: `diffalign grid runs/dpo --sweep guidance_scale=1,3,5,7.5 --prompt "a red circle"`
    """
    from diffalign.evaluation import Look
    from diffalign.jobs import generate as request
    from diffalign.jobs.grid import grid as run
    from diffalign.jobs.grid import subtitle
    from diffalign.jobs.negative import Negative

    texts, numbers = request.read_request(prompts, prompt, seeds, limit)
    settings = sampling(steps, guidance_scale, negative_prompt, height, width, batch_size)
    negative = Negative.of(negative_lora, negative_scale, policy_scale)
    said = subtitle(settings, sweep, negative)
    look = Look(title=title, subtitle=said, cell=cell, theme=theme, font=str(font) if font else None)
    options = {"base": base, "show_base": show_base, "scorers": scorers or (), "negative": negative}
    options |= {"checkpoints": checkpoints, "sweep": sweep, "look": look}
    run(models, texts, numbers, out, settings, **options, torch_dtype=dtype, device=device, console=Console())


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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (generate, grid):
        app.command()(command)
