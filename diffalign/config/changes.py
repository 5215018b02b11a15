"""What of a configuration is not as it is by default."""

from typing import Any

from diffalign import objectives
from diffalign.config.config import Config
from diffalign.yaml_text import dump_yaml


def changed(config: Config) -> dict[str, dict[str, Any]]:
    """Return by section the keys that differ from their defaults, and those that have none.

    `config.check` makes the same configuration of it.
    """
    sections = config.model_dump(mode="json", exclude_defaults=True)
    known = objectives.fields(config.objective_name)
    block = {
        name: value for name, value in sections["objective"].items() if name == "name" or value != known[name].default
    }
    return {name: keys for name, keys in {**sections, "objective": block}.items() if keys}


def dump_changed(config: Config) -> str:
    """Write `changed` as YAML, which `config.load` reads back."""
    return dump_yaml(changed(config))
