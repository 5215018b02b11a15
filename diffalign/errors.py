"""Errors a user can cause. The CLI prints their message without a traceback and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Report a mistake in a user's input: the message names the value, what was expected and the fix."""


class ConfigError(UserError):
    """Report a wrong key, type or combination in a configuration."""


class DataError(UserError):
    """Report missing, broken or unusable data."""


class ModelError(UserError):
    """Report a model or checkpoint that cannot be loaded or written."""


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the candidate nearest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
