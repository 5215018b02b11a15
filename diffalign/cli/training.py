"""Commands that train: train, precompute, demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli.settings import ConfigFile, Overrides, WithSettings


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help='Continue from a checkpoint: "latest" or its folder. Starts afresh if there is no latest.'),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, batch arithmetic and memory, and stop.")
    ] = False,
) -> None:
    """Align a model with preference pairs.

    On several GPUs: `accelerate launch -m diffalign train CONFIG`. The same command with `--resume latest` continues.
    """
    from diffalign import config as configuration

    extra = [f"train.resume_from_checkpoint={resume}"] if resume else []
    resolved = configuration.load(config, [*(overrides or []), *extra])
    if dry_run:
        from diffalign.jobs.training import plan

        plan.show(resolved, Console())
        return
    from diffalign.jobs.training.train import train as run

    run(resolved)


def precompute(config: ConfigFile, overrides: Overrides = None) -> None:
    """Encode images and prompts of a configuration's data into its latent cache, without training.

    With reference.cache_draws, evaluate the reference on all of it too: what then trains needs no reference network.
    Interrupted, it continues where it stopped when run again.
    """
    from diffalign import config as configuration
    from diffalign.jobs.training.precompute import precompute as run

    run(configuration.load(config, overrides), Console())


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="The training configuration.")] = Path("tiny/dpo"),
    prompts: Annotated[Path, typer.Option(help="Held-out prompts, one a line.")] = Path(
        "assets/prompts/tiny-held-out.txt"
    ),
    seed: Annotated[int, typer.Option(help="Seed of training and of the evaluation's noise.")] = 0,
) -> None:
    """Align the embedded model, score it on held-out prompts and show the result, in minutes on a CPU."""
    from diffalign.jobs.world.demo import demo as run

    run(config, output_dir, prompts, seed, Console())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (train, precompute):
        app.command(cls=WithSettings)(command)
    app.command()(demo)
