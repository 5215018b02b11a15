"""YAML as configurations use it: scalars as in YAML 1.2, every key once, and errors that name the place."""

import re
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import ConfigError, DataError
from diffalign.text_files import read_text

_FLOAT = "tag:yaml.org,2002:float"
_NUMBER = re.compile(r"^[-+]?(?:(?:\d[\d_]*)?\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*\.(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$")
_NUMBER_STARTS = list("-+0123456789.")
_REPLACED = (":bool", ":float", ":int", ":timestamp")


class _Loader(yaml.SafeLoader):
    """Read `1e-5` as a number, and `no`, `off`, `on`, `yes`, `010`, `1:30` and dates as words."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice: PyYAML would take the last one without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" is given twice', key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_REPLACED)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _NUMBER, _NUMBER_STARTS)


class _Dumper(yaml.SafeDumper):
    """Quote text that either this module or a YAML 1.1 reader would take for something else."""


_Dumper.add_implicit_resolver(_FLOAT, _NUMBER, _NUMBER_STARTS)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML.

    Raises:
        ConfigError: a syntax error or a key given twice; `origin` says where the text is from.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{origin} is not valid YAML: {problem or error}{where}.") from None


def read_yaml(file: Path) -> Any:
    """Parse a YAML file; raise ConfigError as `parse_yaml` and for what is no text, OSError where it cannot be read."""
    try:
        text = read_text(file)
    except DataError as error:
        raise ConfigError(str(error)) from error
    return parse_yaml(text, str(file))


def split_values(text: str, origin: str) -> list[str]:
    """Split YAML values at the commas between them; each part is a value as it was written.

    Raises:
        ConfigError: a syntax error, such as nothing between two commas.

    Example:
        >>> split_values("1e-5, [mid, up], null", "here")
        ['1e-5', '[mid, up]', 'null']
    """
    parse_yaml(listed := f"[{text}]", origin)
    return [listed[node.start_mark.index : node.end_mark.index] for node in yaml.compose(listed, Loader=_Loader).value]


def dump_yaml(content: dict[str, Any]) -> str:
    """Write plain values as YAML that `parse_yaml` reads back to the same values."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
