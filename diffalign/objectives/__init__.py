"""Preference objectives. One paper a file; adding a file adds an objective, and so does a plug-in of one's own."""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffalign import plugins
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
    "built_in",
    "entry",
    "fields",
    "is_known",
    "load",
    "names",
    "objective_class",
    "plugin",
]
# Files with what objectives share, what is known of them, and what is asked of a user's own.
NO_OBJECTIVES = {"base", "catalogue", "hyperparameters", "plugged"}
_FROM_BASE = ("ListErrors", "Objective", "PairErrors", "Rewards", "SingleErrors", "Transitions")


def __getattr__(name: str) -> Any:
    """Return a class of `base` (PEP 562): it imports torch, which names and hyperparameters do not need."""
    if name not in _FROM_BASE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.base"), name)


def built_in() -> list[str]:
    """List the objectives of this package in alphabetical order: its files without those that hold none."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NO_OBJECTIVES)


def names() -> list[str]:
    """List the objectives that have a name: the built-in ones, then those that installed packages publish."""
    own = built_in()
    return [*own, *(name for name in plugins.published(plugins.OBJECTIVES) if name not in own)]


def is_known(name: Any) -> bool:
    """Tell whether a name is that of an objective, or the address of one, which may yet turn out to be wrong."""
    return isinstance(name, str) and (":" in name or name in names())


def plugin(name: str) -> plugins.Plugin | None:
    """Return the code of an objective of a user's own; None for any other name."""
    address = plugins.address(name, plugins.OBJECTIVES, built_in())
    return None if address is None else plugins.load(address)


def entry(name: str) -> Entry:
    """Return what is known of an objective; of a built-in one without torch. Raises ConfigError if there is none.

    >>> entry("dpo").hyperparameters["beta"].default
    5000.0
    """
    try:
        return catalogue.read(name) if name in built_in() else catalogue.describe(name, objective_class(name))
    except catalogue.Unreadable:
        return catalogue.describe(name, objective_class(name))


def objective_class(name: str) -> "type[Objective[Any]]":
    """Return the one objective that the file `name` defines, or a plug-in by its name or address.

    Raises:
        ConfigError: there is none, or the plug-in is no objective.
    """
    if own := plugin(name):
        return _plugged().objective_class(own.address)
    if name not in built_in():
        if name.endswith(".py"):
            raise ConfigError(f'"{name}" is a file: say which class of it, {name}:NAME. See {plugins.PAGE}.')
        available = names()
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
    if own := plugin(name):
        return _plugged().build(own, hyperparameters)
    return objective_class(name)(**hyperparameters)


def _plugged() -> ModuleType:
    from diffalign.objectives import plugged  # takes torch, which a name does not need

    return plugged
