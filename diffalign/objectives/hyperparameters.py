"""Hyperparameters of objectives as settings: what values they take, and the errors for others. Needs no torch."""

import math
import operator
from dataclasses import dataclass
from typing import Any

from diffalign.errors import ConfigError, suggestion


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the hyperparameter `name` is one of the choices."""
    if value not in choices:
        hint = suggestion(str(value), choices)
        raise ConfigError(f'"objective.{name}" must be one of {", ".join(choices)}, got {value!r}.{hint}')


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> None:
    """Raise ConfigError unless the hyperparameter `name` is a finite number within the limits given."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = [(operator.gt, above), (operator.ge, at_least), (operator.lt, below)]
    if not is_number or not all(holds(value, bound) for holds, bound in bounds if bound is not None):
        wanted = f"a finite number {limits(above=above, at_least=at_least, below=below)}".rstrip()
        raise ConfigError(f'"objective.{name}" must be {wanted}, got {value!r} ({type(value).__name__}).')


def limits(*, above: float | None = None, at_least: float | None = None, below: float | None = None) -> str:
    """Return limits as text, such as "> 0 and < 1"; "" without any."""
    signs = [(">", above), (">=", at_least), ("<", below)]
    return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """One hyperparameter: what may be known of it without building the objective."""

    name: str
    type: str  # as it is annotated: float, int, str
    default: Any
    choices: tuple[str, ...] | None = None  # of words
    bounds: dict[str, float] | None = None  # of numbers: the limits of `check_number`; None: not known
    meaning: str = ""  # of the objective's docstring, in one line

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value that is known to be refused."""
        if self.choices is not None:
            check_choice(self.name, value, self.choices)
        if self.bounds is not None:
            check_number(self.name, value, **self.bounds)

    def normal(self, value: Any) -> Any:
        """Return a whole number as a float where a float is wanted: `beta=500` means 500.0."""
        return float(value) if self.type == "float" else value
