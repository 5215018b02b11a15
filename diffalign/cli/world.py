"""The command that makes the embedded world again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.errors import UserError, suggestion

shapes = typer.Typer(help="The embedded world: a tiny SDXL, a tiny SD3, pairs and reward models.", no_args_is_help=True)


@shapes.callback()
def _group() -> None:
    """Keep `build` a subcommand while it is the only one."""


@shapes.command()
def build(
    assets: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("assets"),
    model: Annotated[
        str, typer.Option(help="sdxl, or sd3: the flow model, which takes prompts and reward models from sdxl's world.")
    ] = "sdxl",
    parts: Annotated[
        str | None,
        typer.Option(
            help="Parts to build, by default all: pipeline,prompts,pairs,captions,rewards,lists,step-aware,lrm in this "
            "order, each of which needs the ones before it; of sd3 pipeline,pairs,captions,lists.",
            show_default=False,
        ),
    ] = None,
    denoiser_steps: Annotated[int | None, typer.Option(help="Training steps of the base model.")] = None,
) -> None:
    """Train every tiny asset of a model's world again from seeds, on a CPU."""
    from dataclasses import replace

    from diffalign.jobs.world import world
    from diffalign.jobs.world.world_data import WORLDS
    from diffalign.shapes.models import MODELS

    if model not in MODELS:
        raise UserError(f'--model must be one of {", ".join(MODELS)}, got "{model}".{suggestion(model, MODELS)}')
    if denoiser_steps is not None and denoiser_steps < 1:
        raise UserError(f"--denoiser-steps must be at least 1, got {denoiser_steps}.")
    recipe = MODELS[model].recipe
    if denoiser_steps is not None:
        recipe = replace(recipe, denoiser_steps=denoiser_steps)
    chosen = world.PARTS[model] if parts is None else parts.split(",")
    world.build(assets, list(chosen), WORLDS[model], recipe, Console())


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(shapes, name="shapes")
