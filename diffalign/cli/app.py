"""The root of the command line: what commands there are, and what happens to errors."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

import diffalign
from diffalign.cli import (
    about,
    evaluating,
    exporting,
    filtering,
    labelling,
    pictures,
    ranking,
    reward,
    scoring,
    training,
    world,
)
from diffalign.errors import UserError

app = typer.Typer(
    name="diffalign",
    help="Align text-to-image diffusion models with human preferences: train, score, evaluate, show.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"diffalign {diffalign.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


for module in (training, exporting, pictures, scoring, ranking, evaluating, labelling, filtering, reward, about, world):
    module.register(app)


def main() -> None:
    """Run the command line; a user's mistake ends with exit code 2 and a message, never with a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # file names need not be text, and terminals need not know UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        _fail("Interrupted. What was finished is on disk; run the same command with --resume to continue.", code=130)
    except Exception as error:
        if not _is_users_mistake(error) or os.environ.get("DIFFALIGN_TRACEBACK"):
            raise
        _fail(str(error))


def _is_users_mistake(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    from reward_models.errors import ScorerError  # with torch, which whoever raises it has imported

    return isinstance(error, ScorerError)


def _fail(message: str, code: int = 2) -> None:
    Console(stderr=True, soft_wrap=True).print("[bold red]Error:[/] ", end="")
    print(message, file=sys.stderr)
    sys.exit(code)
