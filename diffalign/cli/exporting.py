"""The command that writes what a run has trained for other programs: export."""

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
            "unet: a UNet folder, a LoRA merged into it.",
        ),
    ] = "diffusers",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write into (kohya: or the file); by default RUN/export/.")
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


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)
