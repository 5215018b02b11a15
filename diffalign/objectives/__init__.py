"""Preference objectives. One paper a file; adding a file adds an objective."""

import dataclasses
import importlib
import pkgutil
from typing import Any

from diffalign.errors import ConfigError, suggestion
from diffalign.objectives.base import ListErrors, Objective, PairErrors, Rewards, SingleErrors, Transitions

__all__ = [
    "ListErrors",
    "Objective",
    "PairErrors",
    "Rewards",
    "SingleErrors",
    "Transitions",
    "fields",
    "load",
    "names",
    "objective_class",
]


def names() -> list[str]:
    """List the objectives in alphabetical order: the files of this package other than `base`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def objective_class(name: str) -> type[Objective[Any]]:
    """Return the one objective that the file `name` defines. Raises ConfigError if there is no such file."""
    available = names()
    if name not in available:
        hint = suggestion(name, available)
        raise ConfigError(f'Unknown objective "{name}".{hint} Available: {", ".join(available)}.')
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Objective)]
    (defined,) = (found for found in classes if found.__module__ == module.__name__)
    return defined


def fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the hyperparameters of an objective by name, each with its type and default.

    >>> {key: field.default for key, field in fields("dpo").items()}
    {'beta': 5000.0, 'label_smoothing': 0.0}
    """
    return {field.name: field for field in dataclasses.fields(objective_class(name))}


def load(name: str, **hyperparameters: Any) -> Objective[Any]:
    """Build an objective from its name and hyperparameters; the rest keep their defaults.

    Raises ConfigError for an unknown name, an unknown hyperparameter, or a value of the wrong type or range.

    >>> load("dpo", beta=2000.0)
    DPO(beta=2000.0, label_smoothing=0.0)
    """
    known = fields(name)
    for key in hyperparameters:
        if key not in known:
            takes = ", ".join(known) or "no hyperparameters"
            raise ConfigError(f'Unknown key "objective.{key}".{suggestion(key, known)} "{name}" takes: {takes}.')
    return objective_class(name)(**hyperparameters)
