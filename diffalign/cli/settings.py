"""The arguments CONFIG and KEY=VALUE of commands that read a configuration, and settings written as options."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffalign.errors import ConfigError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped one by name: sdxl/dpo.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the file: objective.beta=2000. A key that is unique needs no section: learning_rate=1e-6.",
    ),
]
_NEGATIVE = re.compile(r"-\.?\d")


class WithSettings(TyperCommand):
    """A command that takes settings; one written as an option of an argparse script is answered with the right form."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            ConfigError: some are settings with dashes, such as `--learning_rate 1e-5`.
        """
        rest, settings, notes = self._without_dashes(ctx, list(args))
        if settings:
            line = shlex.join([*ctx.command_path.split(), *rest, *settings])
            raise ConfigError("\n".join(["Settings are written KEY=VALUE, without dashes:", f"  {line}", *notes]))
        return super().parse_args(ctx, args)

    def _without_dashes(self, ctx: Any, args: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Return the arguments without those options that are settings, these as settings, and notes on them."""
        own = {name: option for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        rest, settings, notes = [], [], []
        while args:
            word = args.pop(0)
            name, equals, _ = word.partition("=")
            if name in own and word.startswith("-"):
                takes_more = not equals and not own[name].is_flag
                rest += [word, *([args.pop(0)] if takes_more and args else [])]
                continue
            meant = self._meant(word, args) if word.startswith("-") and not _NEGATIVE.match(word) else None
            if meant is None:
                rest.append(word)
                continue
            setting, count, note = meant
            settings.append(setting)
            notes += [note] if note else []
            del args[:count]
        return rest, settings, notes

    @staticmethod
    def _meant(word: str, following: list[str]) -> tuple[str, int, str] | None:
        from diffalign.config import spelling

        return spelling.without_dashes(word, following)
