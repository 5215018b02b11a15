"""Commands for reward models of one's own: reward train, reward convert."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

reward = typer.Typer(help="Train and convert reward models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="SCORER", help="As in `diffalign list scorers`.")]


@reward.command()
def train(
    name: Name,
    data: Annotated[str, typer.Argument(metavar="PAIRS", help="Preference pairs: parquet, .jsonl, w/ and l/, hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, in the scorer's official format.")],
    init: Annotated[str | None, typer.Option(help="Weights to start from; by default the published ones.")] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out pairs; by default a tenth of the prompts.")] = None,
    recipe: Annotated[str | None, typer.Option(help="pickscore or hpsv2; by default the scorer's own.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs a step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Pairs a pass; the gradient stays the same.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between two validations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the pairs, and which prompts are held out.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the towers in bfloat16.")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Fine-tune a reward model on preference pairs with the recipe of PickScore or HPSv2.

    Example: `diffalign reward train pickscore assets/tiny-pairs --init assets/tiny-pickscore --out runs/pick`
    """
    from diffalign.jobs.reward import train as run

    given = {
        "max_steps": max_steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "eval_every": eval_every,
        "seed": seed,
        "bf16": bf16 or None,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    run(name, data, out, init=init, recipe=recipe, changes=changes, validation=validation, device=device,
        console=Console())  # fmt: skip


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
