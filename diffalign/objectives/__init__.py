"""Preference objectives. One paper a file; adding a file adds an objective."""

import dataclasses
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from diffalign.errors import ConfigError, suggestion
from diffalign.objectives import catalogue
from diffalign.objectives.catalogue import Entry

if TYPE_CHECKING:
    from diffalign.objectives.base import ListErrors, Objective, PairErrors, Rewards, SingleErrors, Transitions

__all__ = [
    "Entry",
    "ListErrors",
    "Objective",
    "PairErrors",
    "Rewards",
    "SingleErrors",
    "Transitions",
    "entry",
    "fields",
    "load",
    "names",
    "objective_class",
]
NO_OBJECTIVES = {"base", "catalogue", "hyperparameters"}  # files with what objectives share, and what is known of them
_FROM_BASE = ("ListErrors", "Objective", "PairErrors", "Rewards", "SingleErrors", "Transitions")


def __getattr__(name: str) -> Any:
    """Return a class of `base` (PEP 562): it imports torch, which names and hyperparameters do not need."""
    if name not in _FROM_BASE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.base"), name)


def names() -> list[str]:
    """List the objectives in alphabetical order: the files of this package, without those that hold none."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NO_OBJECTIVES)


def entry(name: str) -> Entry:
    """Return what is known of an objective without torch. Raises ConfigError if there is none of this name.

    >>> entry("dpo").hyperparameters["beta"].default
    5000.0
    """
    try:
        return catalogue.read(name) if name in names() else catalogue.describe(name, objective_class(name))
    except catalogue.Unreadable:
        return catalogue.describe(name, objective_class(name))


def objective_class(name: str) -> "type[Objective[Any]]":
    """Return the one objective that the file `name` defines. Raises ConfigError if there is no such file."""
    available = names()
    if name not in available:
        hint = suggestion(name, available)
        raise ConfigError(f'Unknown objective "{name}".{hint} Available: {", ".join(available)}.')
    base = importlib.import_module(f"{__name__}.base")
    module = importlib.import_module(f"{__name__}.{name}")
    values = vars(module).values()
    classes = [value for value in values if isinstance(value, type) and issubclass(value, base.Objective)]
    (defined,) = (found for found in classes if found.__module__ == module.__name__)
    return defined


def fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the hyperparameters of an objective by name, each with its type and default.

    >>> {key: field.default for key, field in fields("dpo").items()}
    {'beta': 5000.0, 'label_smoothing': 0.0}
    """
    return {field.name: field for field in dataclasses.fields(objective_class(name))}


def load(name: str, **hyperparameters: Any) -> "Objective[Any]":
    """Build an objective from its name and hyperparameters; the rest keep their defaults.

    Raises ConfigError for an unknown name, an unknown hyperparameter, or a value of the wrong type or range.

    >>> load("dpo", beta=2000.0)
    DPO(beta=2000.0, label_smoothing=0.0)
    """
    entry(name).check(hyperparameters)
    return objective_class(name)(**hyperparameters)
