"""The command that makes the embedded world again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.errors import UserError

shapes = typer.Typer(help="The embedded world: a tiny SDXL, pairs and reward models.", no_args_is_help=True)


@shapes.callback()
def _group() -> None:
    """Keep `build` a subcommand while it is the only one."""


@shapes.command()
def build(
    assets: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("assets"),
    parts: Annotated[
        str, typer.Option(help="Parts to build, in this order; each needs the ones before it.")
    ] = "pipeline,prompts,pairs,captions,rewards,lists,step-aware,lrm",
    unet_steps: Annotated[int | None, typer.Option(help="Training steps of the base model.")] = None,
) -> None:
    """Train every tiny asset again from seeds, on a CPU."""
    from dataclasses import replace

    from diffalign.jobs.world import world
    from diffalign.shapes.pretraining import Pretraining

    if unet_steps is not None and unet_steps < 1:
        raise UserError(f"--unet-steps must be at least 1, got {unet_steps}.")
    recipe = Pretraining() if unet_steps is None else replace(Pretraining(), unet_steps=unet_steps)
    world.build(assets, parts.split(","), world.World(), recipe, Console())


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(shapes, name="shapes")
