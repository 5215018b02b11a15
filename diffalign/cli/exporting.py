"""The commands that write weights for other programs: export what a run has trained, convert any LoRA."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN[/checkpoint-N]", help="A training run, or a checkpoint of one.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers: the LoRA, or unet/ if all weights were tuned. kohya: one LoRA file for ComfyUI and A1111. "
            "comfy: one for ComfyUI, of transformers with ComfyUI's names. unet: a UNet folder, a LoRA merged into it.",
        ),
    ] = "diffusers",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into (kohya, comfy: or the file); by default RUN/export/.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 (as trained), float16 or bfloat16.")] = "float32",
    base: Annotated[str | None, typer.Option(help="The base model, if it is not where the run found it.")] = None,
) -> None:
    """Write the weights of a run, or of one of its checkpoints, for diffusers, ComfyUI and A1111.

    What the run's end exports is written: the moving average if optimizer.use_ema is set.

    Example: `diffalign export runs/dpo --format kohya --dtype float16 --out ComfyUI/models/loras`

    Example: `diffalign export runs/dpo/checkpoint-500 --format unet`
    """
    from diffalign.jobs.training import export as job

    job.run(run, format_, out, dtype, Console(), base=base)


def convert(
    source: Annotated[Path, typer.Argument(help="A LoRA file, whoever made it, or the folder it is in.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write, or a folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="diffusers: load_lora_weights (transformer. or unet., lora_A and lora_B). kohya: sd-scripts, A1111 "
            "(lora_unet_, lora_down and lora_up, q, k and v fused as in the original network). comfy: ComfyUI "
            "(diffusion_model.; of UNets it loads kohya's).",
        ),
    ],
    family: Annotated[
        str | None,
        typer.Option(help="Of the base model: sd15, sdxl, sd3, flux, zimage ... Found by itself where names tell."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base model, a folder or hub id, instead of --family: shapes are checked as well."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="keep (that of SOURCE), float32, float16 or bfloat16.")] = "keep",
    without_text_encoders: Annotated[
        bool, typer.Option("--without-text-encoders", help="Leave out what SOURCE holds of text encoders.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a LoRA in the layout another program loads: diffusers, kohya's sd-scripts, ComfyUI.

    SOURCE may be in any of them, or PEFT's. The update of every layer stays the same: fused layers are divided or
    joined exactly, and alpha / rank is kept. Nothing is dropped: a key that nobody knows stops it, by name.

    Example: `diffalign convert civitai-flux.safetensors loras/mine --to diffusers`

    Example: `diffalign convert runs/dpo-flux ComfyUI/models/loras/mine.safetensors --to comfy --dtype bfloat16`
    """
    from diffalign.jobs.training import convert as job

    text = not without_text_encoders
    job.run(source, out, to, Console(), family=family, model=model, dtype=dtype, text=text, overwrite=overwrite)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(export)
    app.command()(convert)
