"""Configuration: a YAML file, the files below it (`base:`), overrides on the command line, strictly checked.

    diffalign train configs/sdxl/dpo.yaml objective.beta=2000 learning_rate=1e-6

Every key belongs to a section; a key that is unique among all sections, the hyperparameters of the configured objective
included, may be written without it. Unknown keys, wrong types and impossible combinations are errors that say what was
expected. Paths in a file start at its folder, paths in an override where one stands (diffalign/places.py).
"""

import copy
import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from diffalign import objectives, places
from diffalign.config import checks, paths, spelling
from diffalign.config.config import Config
from diffalign.config.keys import sections, type_in_words
from diffalign.errors import ConfigError, DataError, suggestion
from diffalign.text_files import read_text
from diffalign.yaml_text import dump_yaml, parse_yaml

SOURCES = ("dataset_name", "train_data_dir", "prompts_file")  # of data: a run learns from one of them


def load(path: str | Path, overrides: Iterable[str] | None = None, values: Mapping[str, Any] | None = None) -> Config:
    """Load a configuration, lay it over its `base:`, change values and check the result.

    Args:
        path: a file, or the name of a shipped one such as "tiny/dpo".
        overrides: key=value, as on a command line.
        values: as of `change`.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    return change(_with_base(find(path)), overrides, values)


def change(
    config: Config | Mapping[str, Any],
    overrides: Iterable[str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Return a configuration, or what a file of it would hold, with other values, all checked anew.

    Args:
        config: stays as it is; paths in it start where one stands.
        overrides: key=value, as on a command line.
        values: by key, {"train.seed": 1}, or by section, {"train": {"seed": 1}}; they win over `overrides`.
    """
    plain = config.model_dump(exclude_unset=True) if isinstance(config, Config) else copy.deepcopy(dict(config))
    content, words = paths.anchored(plain, Path()), list(overrides or [])
    if meant := spelling.with_equals(words):
        raise ConfigError(f"Settings are written KEY=VALUE, without spaces and colons: {shlex.join(meant)}")
    changes = [*map(_parsed, words), *_flat(values or {})]
    # The objective's name first: it clears the block of another objective and decides which keys there are.
    ordered = sorted(changes, key=lambda change: change[0] != "objective.name")
    given = [_apply(content, key, value) for key, value in ordered]
    sources = {key for section, key, value in given if section == "data" and key in SOURCES and value is not None}
    if sources:
        content["data"] = _without_sources(content["data"], sources)
    return check(content)


def find(name: str | Path, folder: Path | None = None) -> Path:
    """Return the configuration file `name`: a path from `folder` (the current one), or a shipped one such as tiny/dpo.

    Raises:
        ConfigError: there is none.
    """
    inside = f"{str(name).removeprefix('configs/').removesuffix('.yaml')}.yaml"
    for path in ((folder or Path()) / Path(name).expanduser(), (folder or Path()) / "configs" / inside):
        if path.is_file():
            return path
    shipped = places.shipped() / "configs" / inside
    if shipped.is_file():
        return shipped
    if Path(name).is_dir():
        raise ConfigError(f"Cannot read the configuration {name}: Is a directory.")
    near = suggestion(inside.removesuffix(".yaml"), shipped_names())
    raise ConfigError(
        f'There is no configuration "{name}".{near} Give a YAML file, or a shipped one by name, such as sdxl/dpo-lora '
        "(all: diffalign list configs)."
    )


def shipped_names() -> dict[str, Path]:
    """Return the shipped configurations by name; accelerate's own are not among them."""
    root = places.shipped() / "configs"
    files = [file for file in sorted(root.rglob("*.yaml")) if file.parent.name != "accelerate"]
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def check(content: dict[str, Any]) -> Config:
    """Turn a plain dictionary into a checked configuration."""
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(item) for item in error.errors()))) from None
    if not isinstance(config.objective.get("name"), str):
        got = f", got {config.objective['name']!r}" if "name" in config.objective else ""
        raise ConfigError(f'"objective.name" must be one of {", ".join(objectives.names())}{got}.')
    config = config.model_copy(update={"objective": {"name": config.objective_name} | _hyperparameters(config)})
    checks.check(config)
    return config


def _hyperparameters(config: Config) -> dict[str, Any]:
    """Return all hyperparameters of the objective, defaults included; torch is imported only where it must be."""
    given = {key: value for key, value in config.objective.items() if key != "name"}
    config.entry.check(given)
    return config.entry.filled(given if config.entry.complete else dataclasses.asdict(config.build_objective()))


def dump(config: Config) -> str:
    """Write a configuration as YAML that `load` reads back."""
    content = config.model_dump(mode="json")
    if config.train.global_batch_size is not None:
        del content["train"]["gradient_accumulation_steps"]  # follows from it; `load` refuses both
    return dump_yaml(content)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(f"Cannot read the configuration {path}: {reason}.") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as model: and objective:, got {type(content).__name__}.")
    # A section whose keys are all commented out.
    return {section: {} if values is None and section != "base" else values for section, values in content.items()}


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a file says, laid over its base and that file's base; `above` are the files that led here."""
    chain = (*above, path)
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"These files are each other's base: {' -> '.join(map(str, chain))}. Take one `base:` out.")
    content = _read(path)
    with_base, name = "base" in content, content.pop("base", None)
    content = paths.anchored(content, None if places.is_shipped(path) else path.parent)
    if not with_base:
        return content
    if not isinstance(name, str):
        raise ConfigError(f'"base" in {path} must be a file beside it or a shipped one (tiny/dpo), got {name!r}.')
    try:
        base = find(name, path.parent)
    except ConfigError as error:
        raise ConfigError(f'"base" in {path}: {error}') from None
    return _merge(_with_base(base, chain), content)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay one file over another, section by section; another objective replaces the block whole."""
    merged = dict(base)
    for section, values in changes.items():
        below = base.get(section)
        both = isinstance(below, dict) and isinstance(values, dict)
        if both and section == "objective" and values.get("name", below.get("name")) != below.get("name"):
            both = False
        if both and section == "data":
            named = {key for key in SOURCES if values.get(key) is not None}
            below = _without_sources(below, named) if named else below
        merged[section] = {**below, **values} if both else values
    return merged


def _without_sources(data: dict[str, Any], named: set[str]) -> dict[str, Any]:
    """Return the block `data` without the sources that those `named` above it replace."""
    return {key: value for key, value in data.items() if key not in SOURCES or key in named}


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


def _apply(content: dict[str, Any], key: str, value: Any) -> tuple[str, str, Any]:
    """Set one value; return its section, key and value."""
    section, _, leaf = _qualify(key, content).rpartition(".")
    block = content.setdefault(section, {})
    if not isinstance(block, dict):
        raise ConfigError(f'"{section}" must hold keys, got {block!r}.')
    if (section, leaf) == ("objective", "name") and block.get("name") != value:
        block.clear()
    block[leaf] = paths.anchored_value(section, leaf, value)
    return section, leaf, block[leaf]


def _keys(content: dict[str, Any]) -> dict[str, list[str]]:
    """List the keys of every section; those of `objective` are the hyperparameters of the one that is configured."""
    block = content.get("objective")
    name = block.get("name") if isinstance(block, dict) else None
    hyperparameters = objectives.entry(name).hyperparameters if objectives.is_known(name) else []
    return {
        **{section: list(model.model_fields) for section, model in sections().items()},
        "objective": ["name", *hyperparameters],
    }


def _qualify(key: str, content: dict[str, Any]) -> str:
    """Return `section.key`, finding the section of a bare key."""
    if "." in key:
        return key
    known = _keys(content)
    owners = [section for section, keys in known.items() if key in keys]
    if len(owners) == 1:
        if other := spelling.could_be(key, owners[0]):
            raise ConfigError(f'"{key}" could mean {other} or {owners[0]}.{key}: write one of them.')
        return f"{owners[0]}.{key}"
    if owners:
        raise ConfigError(f'"{key}" exists in several sections: write {" or ".join(f"{o}.{key}" for o in owners)}.')
    qualified = [f"{section}.{name}" for section, keys in known.items() for name in keys]
    block = content.get("objective")
    raise ConfigError(spelling.unknown(key, qualified, block.get("name") if isinstance(block, dict) else None))


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


def _explain(error: dict[str, Any]) -> str:
    """Say in one line what is wrong with a value."""
    path, kind, value = error["loc"], error["type"], error["input"]
    key, got = ".".join(map(str, path)), f"got {value!r} ({type(value).__name__})"
    if kind == "extra_forbidden":
        known = [f"{name}.{leaf}" for name, model in sections().items() for leaf in model.model_fields]
        near = suggestion(key, Config.model_fields)
        return spelling.unknown(key, known) if len(path) > 1 else f'Unknown key "{key}".{near}'
    if kind == "missing":
        return f'Missing key "{key}".'
    # Of a value of several types, pydantic adds the one that did not match to the path.
    if kind in ("too_short", "too_long") or (len(path) > 2 and isinstance(path[2], str)):
        key = ".".join(path[:2])
        return f'"{key}" must be: {type_in_words(sections()[path[0]].model_fields[path[1]])}; {got}.'
    if kind in _EXPECTED:
        return f'"{key}" must be {_EXPECTED[kind]}, {got}.'
    if kind == "value_error":
        return f"{error['ctx']['error']}."
    message = error["msg"].removeprefix("Input should be ")
    return f'"{key}" must be {message}, {got}.'
