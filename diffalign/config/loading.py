"""Configuration: a YAML file, one level of `base:`, overrides on the command line, strictly checked.

    diffalign train configs/sdxl/dpo.yaml objective.beta=2000 learning_rate=1e-6

Every key belongs to a section; a key that is unique among all sections, the hyperparameters of the configured objective
included, may be written without it. Unknown keys, wrong types and impossible combinations are errors that say what was
expected.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel, ValidationError

from diffalign import objectives
from diffalign.config import checks
from diffalign.config.config import Config
from diffalign.errors import ConfigError, suggestion
from diffalign.yaml_text import dump_yaml, parse_yaml


def load(path: str | Path, overrides: Iterable[str] | None = None, values: Mapping[str, Any] | None = None) -> Config:
    """Load a configuration file, lay it over its `base:`, change values and check the result.

    Args:
        path: the YAML file.
        overrides: key=value, as on a command line.
        values: as of `change`.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    return change(_with_base(Path(path)), overrides, values)


def change(
    config: Config | Mapping[str, Any],
    overrides: Iterable[str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Return a configuration, or what a file of it would hold, with other values, all checked anew.

    Args:
        config: stays as it is.
        overrides: key=value, as on a command line.
        values: by key, {"train.seed": 1}, or by section, {"train": {"seed": 1}}; they win over `overrides`.
    """
    content = config.model_dump(exclude_unset=True) if isinstance(config, Config) else copy.deepcopy(dict(config))
    changes = [*map(_parsed, overrides or []), *_flat(values or {})]
    # The objective's name first: it clears the block of another objective and decides which keys there are.
    for key, value in sorted(changes, key=lambda change: change[0] != "objective.name"):
        _apply(content, key, value)
    return check(content)


def check(content: dict[str, Any]) -> Config:
    """Turn a plain dictionary into a checked configuration."""
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None
    if not isinstance(config.objective.get("name"), str):
        got = f", got {config.objective['name']!r}" if "name" in config.objective else ""
        raise ConfigError(f'"objective.name" must be one of {", ".join(objectives.names())}{got}.')
    config = config.model_copy(update={"objective": {"name": config.objective_name} | _hyperparameters(config)})
    checks.check(config)
    return config


def _hyperparameters(config: Config) -> dict[str, Any]:
    """Return all hyperparameters of the objective, defaults included; `beta=500` means 500.0."""
    given, known = dataclasses.asdict(config.build_objective()), objectives.fields(config.objective_name)
    return {name: float(value) if known[name].type is float else value for name, value in given.items()}


def dump(config: Config) -> str:
    """Write a configuration as YAML that `load` reads back."""
    content = config.model_dump(mode="json")
    if config.train.global_batch_size is not None:
        del content["train"]["gradient_accumulation_steps"]  # follows from it; `load` refuses both
    return dump_yaml(content)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot read the configuration {path}: {reason}.") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as model: and objective:, got {type(content).__name__}.")
    # A section whose keys are all commented out.
    return {section: {} if values is None and section != "base" else values for section, values in content.items()}


def _with_base(path: Path) -> dict[str, Any]:
    content = _read(path)
    if "base" not in content:
        return content
    name = content.pop("base")
    if not isinstance(name, str):
        raise ConfigError(f'"base" in {path} must be a file name relative to that file, got {name!r}.')
    base = _read(path.parent / name)
    if "base" in base:
        raise ConfigError(f"{path.parent / name} has a base of its own; only one level is allowed.")
    return _merge(base, content)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay one file over another, section by section; another objective replaces the block whole."""
    merged = dict(base)
    for section, values in changes.items():
        below = base.get(section)
        both = isinstance(below, dict) and isinstance(values, dict)
        if both and section == "objective" and values.get("name", below.get("name")) != below.get("name"):
            both = False
        merged[section] = {**below, **values} if both else values
    return merged


def _parsed(override: str) -> tuple[str, Any]:
    """Return key and value of an override."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f'An override is written key=value, e.g. objective.beta=2000; got "{override}".')
    return key.strip(), parse_yaml(text, f'The override "{override}"')


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, of sections too, in the types that YAML has."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{key}.{leaf}": inner for leaf, inner in value.items()})
        elif isinstance(value, PurePath):
            yield key, str(value)
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def _apply(content: dict[str, Any], key: str, value: Any) -> None:
    section, _, leaf = _qualify(key, content).rpartition(".")
    block = content.setdefault(section, {})
    if not isinstance(block, dict):
        raise ConfigError(f'"{section}" must hold keys, got {block!r}.')
    if (section, leaf) == ("objective", "name") and block.get("name") != value:
        block.clear()
    block[leaf] = value


def _sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Config.model_fields.items() if name != "objective"}


def _keys(content: dict[str, Any]) -> dict[str, list[str]]:
    """List the keys of every section; those of `objective` are the hyperparameters of the one that is configured."""
    block = content.get("objective")
    name = block.get("name") if isinstance(block, dict) else None
    hyperparameters = objectives.fields(name) if name in objectives.names() else []
    return {
        **{section: list(model.model_fields) for section, model in _sections().items()},
        "objective": ["name", *hyperparameters],
    }


def _qualify(key: str, content: dict[str, Any]) -> str:
    """Return `section.key`, finding the section of a bare key."""
    if "." in key:
        return key
    sections = _keys(content)
    owners = [section for section, keys in sections.items() if key in keys]
    if len(owners) == 1:
        return f"{owners[0]}.{key}"
    if owners:
        raise ConfigError(f'"{key}" exists in several sections: write {" or ".join(f"{o}.{key}" for o in owners)}.')
    known = [f"{section}.{name}" for section, keys in sections.items() for name in keys]
    raise ConfigError(f'Unknown key "{key}".{_near(key, known)}')


def _near(key: str, known: list[str]) -> str:
    """Suggest a qualified key whose last part is near."""
    leaves = {name.rpartition(".")[2]: name for name in known}
    hint = suggestion(key.rpartition(".")[2], leaves)
    return next((f' Did you mean "{full}"?' for leaf, full in leaves.items() if f'"{leaf}"' in hint), "")


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a word or text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
}
_UNION_MEMBERS = ("str", "list[str]")  # pydantic adds the member that did not match to the path


def _explain(error: dict[str, Any]) -> str:
    """Say in one line what is wrong with a value."""
    key = ".".join(str(part) for part in error["loc"] if part not in _UNION_MEMBERS)
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f'Unknown key "{key}".{suggestion(key.rpartition(".")[2], _siblings(error["loc"]))}'
    if kind == "missing":
        return f'Missing key "{key}".'
    got = f"got {value!r} ({type(value).__name__})"
    if kind in _EXPECTED:
        return f'"{key}" must be {_EXPECTED[kind]}, {got}.'
    if kind == "value_error":
        return f"{error['ctx']['error']}."
    message = error["msg"].removeprefix("Input should be ")
    return f'"{key}" must be {message}, {got}.'


def _siblings(location: tuple[Any, ...]) -> list[str]:
    if len(location) == 1:
        return list(Config.model_fields)
    section = _sections().get(str(location[0]))
    return list(section.model_fields) if section else []
