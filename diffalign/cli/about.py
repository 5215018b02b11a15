"""Commands that tell: info, list, show."""

from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli.settings import WithSettings


def info() -> None:
    """Print versions, devices, optional parts and cache folders: paste it into a bug report.

    Example: `diffalign info`
    """
    from diffalign.jobs import info as job

    job.info(Console())


def list_(kind: Annotated[str, typer.Argument(metavar="KIND", help="objectives, scorers, configs or keys.")]) -> None:
    """List what there is to use.

    Example: `diffalign list objectives`
    """
    from diffalign.jobs import about

    about.list_kind(kind, Console())


def show(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="objective, scorer, config, key or keys.")],
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Such as dpo, pickscore, my_losses.py:Mine, tiny/dpo, train_batch_size."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For a config: changes to the file.")
    ] = None,
) -> None:
    """Explain an objective (paper, equation, hyperparameters), a scorer (its card), a config (all its values) or a key.

    Example: `diffalign show objective dpo`

    Example: `diffalign show key train_batch_size`

    Example: `diffalign show keys > docs/configuration.md`
    """
    from diffalign.jobs import about

    about.show(kind, name, overrides or [], Console())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(info)
    app.command(name="list")(list_)
    app.command(cls=WithSettings)(show)
