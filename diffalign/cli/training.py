"""Commands that train: train, precompute, demo."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diffalign.cli import options
from diffalign.cli.settings import ConfigFile, Overrides, WithSettings
from diffalign.errors import ConfigError, UserError, suggestion

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take the place of an earlier run in the folder.")]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Whether a run is only told of."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, whether it fits and what is wrong, and stop.")
    ] = False
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, help="Of --dry-run: GiB of the GPU to plan for; by default this machine's.")
    ] = None
    full: Annotated[
        bool, typer.Option("--full", help="Of --dry-run: print all keys, not only those that are changed.")
    ] = False

    @property
    def how(self) -> dict[str, Any]:
        """Return the arguments of a dry run."""
        return {"gpu_memory": self.gpu_memory, "full": self.full}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which values are tried, and how their models are compared."""

    sweep: Annotated[
        list[str] | None,
        typer.Option(help="A run for each value, in a folder each: objective.beta=1000,5000. Repeated: the grid."),
    ] = None
    prompts: Annotated[
        str | None, typer.Option(help="Of --sweep: draw these prompts with every model; as `evaluate` takes them.")
    ] = None
    scorers: options.Scorers = None

    def judging(self):
        """Return the `Judging` that is asked for, or None."""
        from diffalign.jobs.drawing.prompt_sets import open_prompt_set
        from diffalign.jobs.evaluating.sweep import Judging

        if bool(self.prompts) != bool(self.scorers):
            raise ConfigError("--prompts says what to draw and --with who judges it: give both or neither.")
        return Judging(prompts=open_prompt_set(self.prompts), scorers=self.scorers) if self.prompts else None


@options.grouped
def train(
    *,
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(help='Continue from a checkpoint: "latest" or its folder. Starts afresh if there is no latest.'),
    ] = None,
    overwrite: Overwrite = False,
    dry: DryRun,
    sweep: Sweep,
) -> None:
    """Align a model with preference pairs.

    On several GPUs: `accelerate launch -m diffalign train CONFIG`. The same command with `--resume latest` continues.

    Example: `diffalign train configs/sdxl/dpo-lora.yaml --dry-run --gpu-memory 24`

    Example: `diffalign train configs/sdxl/dpo-lora.yaml --sweep objective.beta=1000,5000`
    """
    from diffalign import config as configuration

    if sweep.sweep:
        _sweep(config, overrides or [], sweep, resume, dry, overwrite)
        return
    if sweep.prompts or sweep.scorers:
        raise ConfigError("--prompts and --with compare the models of a --sweep. For one: diffalign evaluate.")
    _require_one(resume, overwrite)
    extra = [f"train.resume_from_checkpoint={resume}"] if resume else []
    resolved = configuration.load(config, [*(overrides or []), *extra])
    if dry.dry_run:
        from diffalign.jobs.training import plan

        plan.dry_run(resolved, _console(), **dry.how, overwrite=overwrite)
        return
    from diffalign.jobs.training.train import train as run

    run(resolved, overwrite=overwrite)


def _require_one(resume: str | None, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume continues the run in the folder, --overwrite replaces it: give one of them.")


def _sweep(file: Path, overrides: list[str], sweep: Sweep, resume: str | None, dry: DryRun, overwrite: bool) -> None:
    from diffalign.jobs.evaluating import sweep as job

    _require_one(resume, overwrite)
    if resume not in (None, "latest"):
        raise ConfigError(f'--resume "{resume}" names one checkpoint, a sweep has some in every folder. Use latest.')
    judging = sweep.judging()
    runs = job.runs_of(file, overrides, sweep.sweep, resume=resume is not None)
    if dry.dry_run:
        job.dry_run(runs, _console(), **dry.how, overwrite=overwrite)
    else:
        job.sweep(runs, _console(), judging, overwrite=overwrite)


def _console() -> Console:
    """Return where to print; of several processes only the first does."""
    return Console(quiet=os.environ.get("RANK", "0") != "0")


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
    model: Annotated[
        str, typer.Option(help="The embedded model: sdxl, or sd3, which learns by flow matching.")
    ] = "sdxl",
    config: Annotated[
        Path | None,
        typer.Option(help="The training configuration, in place of the model's own.", show_default=False),
    ] = None,
    prompts: Annotated[Path, typer.Option(help="Held-out prompts, one a line.")] = Path(
        "assets/prompts/tiny-held-out.txt"
    ),
    seed: Annotated[int, typer.Option(help="Seed of training and of the evaluation's noise.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Align the embedded model, score it on held-out prompts and show the result, in minutes on a CPU.

    Run again, it goes on where it was interrupted.
    """
    from diffalign.jobs.world.demo import RECIPES
    from diffalign.jobs.world.demo import demo as run

    if model not in RECIPES:
        raise UserError(f'--model must be one of {", ".join(RECIPES)}, got "{model}".{suggestion(model, RECIPES)}')
    run(config or RECIPES[model], output_dir, prompts, seed, Console(), overwrite=overwrite)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (train, precompute):
        app.command(cls=WithSettings)(command)
    app.command()(demo)
