"""The root of the command line: what commands there are, and what happens to errors."""

import os
import sys
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

import diffalign
from diffalign.cli import (
    about,
    captioning,
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
from diffalign.interrupts import Interrupted, at_once

GO_ON = {"train": "the same command with --resume latest", "reward": "the same command with --resume"}


class _Stopped(BaseException):
    """Carry an interrupt past typer, which would end the process without a word."""


class _Root(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Stopped from interrupt


app = typer.Typer(
    cls=_Root,
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


for module in (
    training,
    exporting,
    pictures,
    scoring,
    ranking,
    evaluating,
    labelling,
    filtering,
    captioning,
    reward,
    about,
    world,
):
    module.register(app)


def main() -> None:
    """Run the command line; a user's mistake ends with exit code 2 and a message, never with a traceback.

    A signal to stop ends it with 128 and the signal's number, and a message that says how to go on.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # file names need not be text, and terminals need not know UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with at_once():
            app()
    except (KeyboardInterrupt, _Stopped) as error:
        _tell_stopped(error.__cause__ or error)
    except Exception as error:
        if not _is_users_mistake(error) or os.environ.get("DIFFALIGN_TRACEBACK"):
            raise
        _fail(str(error))


def _is_users_mistake(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    from reward_models.errors import ScorerError  # with torch, which whoever raises it has imported

    return isinstance(error, ScorerError)


def _tell_stopped(interrupt: BaseException) -> None:
    """Say what is saved and how to go on; of several processes only the first does."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    said = str(interrupt) or f"What was finished is on disk; {GO_ON.get(command, 'the same command')} goes on."
    name, code = (interrupt.name, interrupt.exit_code) if isinstance(interrupt, Interrupted) else ("Ctrl-C", 130)
    _end("Interrupted", f"{name}. {said}" if os.environ.get("RANK", "0") == "0" else "", code)


def _fail(message: str) -> None:
    _end("Error", message, 2)


def _end(kind: str, message: str, code: int) -> None:
    if message:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind}:[/] ", end="")
        print(message, file=sys.stderr)
    sys.exit(code)
