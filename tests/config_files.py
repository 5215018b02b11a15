"""A minimal configuration file for tests, and what it is answered with changes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign import config as configuration
from diffalign.errors import ConfigError

MINIMAL = """
model:
  pretrained_model_name_or_path: some/model
data:
  train_data_dir: pairs
objective:
  name: dpo
  beta: 2000.0
"""


def write(folder: Path, text: str = MINIMAL, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf8")
    return path


def loader(folder: Path) -> Callable[..., configuration.Config]:
    """Return a function that loads the minimal configuration with overrides."""
    path = write(folder)
    return lambda *overrides: configuration.load(path, list(overrides))


def message(load: Callable[..., configuration.Config], *overrides: str) -> str:
    """Return what a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)
