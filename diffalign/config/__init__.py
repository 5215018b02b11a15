"""Configuration of training runs: sections, loading with overrides, checks."""

from diffalign.config.config import Config
from diffalign.config.loading import changed, check, dump, load

__all__ = ["Config", "changed", "check", "dump", "load"]
