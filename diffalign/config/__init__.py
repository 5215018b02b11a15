"""Configuration of training runs: sections, loading with overrides, checks."""

from diffalign.config.changes import changed
from diffalign.config.config import Config
from diffalign.config.loading import change, check, dump, find, load, shipped_names
from diffalign.config.paths import portable

__all__ = ["Config", "change", "changed", "check", "dump", "find", "load", "portable", "shipped_names"]
