"""Objectives of users' own: what a class must be, checked before a model is loaded."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from diffalign import plugins
from diffalign.errors import ConfigError
from diffalign.objectives.base import (
    NEEDS,
    SCALARS,
    UNITS,
    ListErrors,
    Objective,
    PairErrors,
    Rewards,
    SingleErrors,
    Transitions,
)
from diffalign.vocabulary import BACKPROPAGATIONS, ROLLOUTS

CONTAINERS = {
    "pair": PairErrors,
    "single": SingleErrors,
    "list": ListErrors,
    "transition": Transitions,
    "reward": Rewards,
}
EXAMPLES = 2  # of the trial


@functools.cache
def objective_class(address: str) -> type[Objective[Any]]:
    """Return the objective at an address.

    Raises:
        ConfigError: it is none, or its loss fails on two examples.
    """
    plugin = plugins.load(address)
    objective = None
    if not (faults := _faults(plugin.value)):
        objective = build(plugin, {})
        faults = _traits(objective)
    if faults:
        raise ConfigError(f"{address} is no objective: {'; '.join(faults)}. See {plugins.PAGE}.")
    loss = _trial(objective, plugin)
    if not isinstance(loss, Tensor) or loss.shape != (EXAMPLES,) or not loss.requires_grad:
        got = type(loss).__name__ if not isinstance(loss, Tensor) else f"{list(loss.shape)}"
        without = " without gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ConfigError(
            f"The loss of {address} must be one number an example, with gradient: the trainer takes the mean. For "
            f"{EXAMPLES} examples it is {got}{without}, expected [{EXAMPLES}]."
        )
    return plugin.value


def build(plugin: plugins.Plugin, hyperparameters: dict[str, Any]) -> Objective[Any]:
    """Build an objective of a user's own; raise ConfigError for whatever its checks raise."""
    given = ", ".join(f"{key}={value!r}" for key, value in hyperparameters.items()) or "its defaults"
    with plugins.told(f"{plugin.address} does not take {given}", plugin.file.parent):
        return plugin.value(**hyperparameters)


def _faults(found: Any) -> list[str]:
    """Return what keeps a class from being built as objectives are."""
    if not isinstance(found, type) or not issubclass(found, Objective):
        return ["it must be a class that derives from diffalign.objectives.Objective"]
    parameters = vars(found).get("__dataclass_params__")
    faults = [f"it lacks {name}()" for name in sorted(found.__abstractmethods__)]
    if parameters is None or not parameters.frozen:
        return [*faults, "it must be decorated with @dataclass(frozen=True, kw_only=True)"]
    fields = [f for f in dataclasses.fields(found) if f.default is f.default_factory is dataclasses.MISSING]
    return [*faults, *(f"{field.name} needs a default" for field in fields)]


def _traits(objective: Objective[Any]) -> list[str]:
    """Return what an objective says wrongly about itself."""
    needs, layout = getattr(objective, "needs", None), getattr(objective, "layout", None)
    ways = BACKPROPAGATIONS if layout == "reward" else ROLLOUTS
    faults = {
        f"layout must be one of {', '.join(UNITS)}, got {layout!r}": layout not in UNITS,
        f"needs must be a frozenset of {', '.join(sorted(NEEDS))}, got {needs!r}": (
            not isinstance(needs, frozenset) or not needs <= NEEDS
        ),
        f"rollout must be one of {', '.join(ways)}, got {objective.rollout!r}": (
            layout in ("transition", "reward") and objective.rollout not in ways
        ),
    }
    return [fault for fault, holds in faults.items() if holds]


def _trial(objective: Objective[Any], plugin: plugins.Plugin) -> Any:
    """Return the loss of two examples that carry what the objective asks for, and no more."""
    layout, pairs = objective.layout, "advantages" not in objective.needs
    shape, given = (EXAMPLES, 3) if layout == "list" else (EXAMPLES,), {}
    for field in dataclasses.fields(CONTAINERS[layout]):
        need = next((need for need in NEEDS if field.name.startswith(need)), None)
        single = layout == "transition" and field.name in ("log_prob_l", "reference_log_prob_l", "label") and not pairs
        if field.name not in SCALARS and not single and (need is None or need in objective.needs):
            given[field.name] = torch.linspace(0.1, 0.2, shape[-1]).expand(shape).clone().requires_grad_()
    if "progress" in objective.needs and layout in ("pair", "single", "list"):
        given["progress"] = torch.tensor(0.5)
    if "desirable" in given:
        given["desirable"] = torch.tensor([True, False]) if not objective.chosen_only else None
    errors = CONTAINERS[layout](**given)
    with plugins.told(f"The loss of {plugin.address} fails", plugin.file.parent):
        statistic = objective.statistic(errors)
        return objective.loss(errors if statistic is None else dataclasses.replace(errors, statistic=statistic))
