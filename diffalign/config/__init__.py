"""Configuration of training runs: sections, loading with overrides, checks."""

from diffalign.config.config import Config
from diffalign.config.loading import change, check, dump, load

__all__ = ["Config", "change", "check", "dump", "load"]
