"""Modules of jobs by the names they had before jobs had wings: scripts outside this repository import them."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WINGS = {
    "drawing": ("checkpoints", "generate", "grid", "grid_columns", "models", "negative", "pictures", "prompts"),
    "evaluating": ("arena", "evaluate", "sweep"),
    "rewards": ("reward",),
    "scoring": ("decode", "engine", "filter", "pairs", "rank", "score", "scorers", "store"),
    "training": ("assemble", "examples", "export", "identity", "precompute", "preflight", "rollout", "train"),
    "world": ("demo", "world_data"),
}
NAMES = {f"diffalign.jobs.{name}": f"diffalign.jobs.{wing}.{name}" for wing, names in _WINGS.items() for name in names}


class _Moved(MetaPathFinder, Loader):
    """Find a module under its old name: the very module, not a second copy of it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(NAMES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import system has put the old name's there


def find_moved() -> None:
    """Let the old names be imported, from now on in this process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
