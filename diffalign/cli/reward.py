"""Commands for reward models of one's own: reward train, reward convert."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options

reward = typer.Typer(help="Train and convert reward models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="SCORER", help="As in `diffalign list scorers`; or lrm, lrm_sdxl.")]


@reward.command()
def train(
    name: Name,
    data: Annotated[str, typer.Argument(metavar="PAIRS", help="Preference pairs: parquet, .jsonl, w/ and l/, hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, in the scorer's official format.")],
    init: Annotated[str | None, typer.Option(help="Weights to start from; by default the published ones.")] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out pairs; by default a tenth of the prompts.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Another scorer's recipe; by default its own.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Pairs a pass; the gradient stays the same.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between two validations.")] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Prompts held out without --validation.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode pictures.")] = None,
    model: Annotated[str | None, typer.Option(help="step_aware, lrm: the model whose steps it will judge.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="step_aware: of the one-step prediction.")] = 5.0,
    draws: Annotated[
        int | None, typer.Option(help="step_aware: (timestep, noise) a pair, kept; by default new ones every epoch.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Where they, or the latents of lrm, are kept; else in OUT.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out broken rows.")] = False,
    root: options.Root = None,
    seed: Annotated[int | None, typer.Option(help="Order of the pairs, and which prompts are held out.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the towers in bfloat16.")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Fine-tune a reward model on preference pairs with the recipe of its authors; several GPUs by accelerate launch.

    Example: `diffalign reward train pickscore assets/tiny-pairs --init assets/tiny-pickscore --out runs/pick`
    """
    from diffalign.jobs.rewards.reward import Steps
    from diffalign.jobs.rewards.reward import train as run

    given = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "eval_every": eval_every,
        "validation_fraction": validation_fraction,
        "num_workers": workers,
        "seed": seed,
        "bf16": bf16 or None,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    steps = Steps(model=model, guidance_scale=guidance_scale, draws=draws, keep=keep)
    run(name, data, out, init=init, recipe=recipe, changes=changes, validation=validation, device=device,
        console=Console(), steps=steps, resume=resume, overwrite=overwrite, dry_run=dry_run,
        skip_broken=skip_broken, root=root)  # fmt: skip


@reward.command()
def convert(
    name: Name,
    source: Annotated[str, typer.Argument(help="A checkpoint in any form the scorer loads: file, folder, hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for safetensors, configuration and tokenizer.")],
) -> None:
    """Write the weights of a reward model as safetensors, checked name by name."""
    import reward_models

    folder = reward_models.convert(name, source, out)
    Console().print(f"{folder}: use it with --with {name}={folder}", markup=False, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(reward, name="reward")
