"""A folder of a user's own to work in, and what makes this process as new as the next command's would be."""

import sys
from pathlib import Path

from diffalign import plugins
from diffalign.jobs.scoring import plugged as scorers
from diffalign.objectives import plugged as objectives


def forget(folder: Path) -> None:
    """Forget what was loaded from a folder, and what packages publish."""
    for cached in (plugins.load, plugins.published, objectives.objective_class, scorers.find):
        cached.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def publish(folder: Path, entries: str, name: str = "x", version: str = "0.1") -> None:
    """Write what pip leaves of an installed package with these entry points."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entries)
