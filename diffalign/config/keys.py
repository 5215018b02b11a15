"""Every key a configuration may have: its section, type, default and meaning, read from the classes of the sections."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffalign import objectives
from diffalign.config.config import Config
from diffalign.objectives.hyperparameters import Hyperparameter, limits

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_SIGNS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, in words."""

    section: str
    name: str
    type: str
    default: str  # "" of a key that must be given
    meaning: str
    objective: str | None = None  # of a hyperparameter: whose
    is_switch: bool = False  # true and false are among its values

    @property
    def full(self) -> str:
        """Return section.key."""
        return f"{self.section}.{self.name}"


def sections() -> dict[str, type[BaseModel]]:
    """Return the classes of the sections other than `objective`, which is another block for every objective."""
    return {name: field.annotation for name, field in Config.model_fields.items() if name != "objective"}


@functools.cache
def keys() -> tuple[Key, ...]:
    """Return every key, section by section; of `objective` those of all objectives."""
    blocks = {section: _keys_of(section) for section in Config.model_fields}
    return tuple(key for block in blocks.values() for key in block)


def _keys_of(section: str) -> Iterator[Key]:
    if section == "objective":
        yield from _objective_keys()
        return
    for name, field in sections()[section].model_fields.items():
        yield Key(
            section=section,
            name=name,
            type=type_in_words(field),
            default="" if field.is_required() else value_in_words(field.default),
            meaning=" ".join((field.description or "").split()),
            is_switch=bool in _members(field.annotation),
        )


def _objective_keys() -> Iterator[Key]:
    names = ", ".join(objectives.built_in())
    about = "The method; the rest of the section are its hyperparameters."
    yield Key(section="objective", name="name", type=f"one of {names}", default="", meaning=about)
    for objective in objectives.built_in():
        for known in objectives.entry(objective).hyperparameters.values():
            yield Key(
                section="objective",
                name=known.name,
                type=_hyperparameter_in_words(known),
                default=value_in_words(known.default),
                meaning=known.meaning,
                objective=objective,
                is_switch=known.type == "bool",
            )


def type_in_words(field: FieldInfo) -> str:
    """Return what values a field takes: "whole number >= 1, or null", "one of a, b", "text or list of texts"."""
    members, bounds = _members(field.annotation), _limits(field.metadata)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    kinds = []
    if words:
        kinds.append(f"one of {', '.join([*(['true', 'false'] if bool in members else []), *words])}")
    for member in members:
        if get_origin(member) is list:
            kinds.append(_list_in_words(get_args(member)[0], field.metadata))
        elif member in _WORDS and not (member is bool and words):
            kinds.append(f"{_WORDS[member]} {bounds}".rstrip() if member in (int, float) else _WORDS[member])
    text = " or ".join(sorted(kinds, key=lambda kind: kind.startswith("list")))
    return f"{text}, or null" if NoneType in members else text


def value_in_words(value: Any) -> str:
    """Return a value as one writes it in a configuration."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_in_words(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("e-0", "e-").replace("e+0", "e") if isinstance(value, float) else str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _limits(metadata: list[Any]) -> str:
    signs = [(item, _SIGNS[type(item)]) for item in metadata if type(item) in _SIGNS]
    return " and ".join(f"{sign} {value_in_words(getattr(item, name))}" for item, (sign, name) in signs)


def _list_in_words(item: Any, metadata: list[Any]) -> str:
    shortest = next((limit.min_length for limit in metadata if isinstance(limit, MinLen)), 0)
    longest = next((limit.max_length for limit in metadata if isinstance(limit, MaxLen)), None)
    count = f"{shortest} " if shortest == longest else ""
    what = ", ".join(get_args(item)) if get_origin(item) is Literal else f"{_WORDS[item]}s"
    return f"list of {count}{what}{' (not empty)' if shortest and not count else ''}"


def _hyperparameter_in_words(known: Hyperparameter) -> str:
    if known.choices is not None:
        return f"one of {', '.join(known.choices)}"
    word = {kind.__name__: text for kind, text in _WORDS.items()}.get(known.type, known.type)
    return f"{word} {limits(**known.bounds or {})}".rstrip()
