"""Where things lie: what ships with the package, and whether a word is a path or a hub id.

A path means one thing. In a configuration it starts at that file's folder (in a shipped one: at what ships), on the
command line at the folder one stands in. What is not found there is looked for among what ships with the package, so
that `assets/tiny-sdxl` names the embedded model anywhere.
"""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).parent
KINDS = ("configs", "assets")  # the folders that ship
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w")
# Folders of these names are people's own: a missing runs/demo is no repository of a user called "runs".
OWN = frozenset({*KINDS, "runs", "cache", "out", "outputs", "checkpoints"})
FILE_SUFFIXES = frozenset(
    {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".jsonl", ".yaml", ".parquet", ".txt"}
)


def shipped() -> Path:
    """Return the folder that holds `configs/` and `assets/`: the checkout, or a folder of the installed package."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else PACKAGE / "shipped"


def is_shipped(path: Path) -> bool:
    """Tell whether a file or folder is one that ships with the package."""
    return any(path.absolute().is_relative_to(shipped() / kind) for kind in KINDS)


def find(text: str | Path, folder: Path | None = None) -> Path | None:
    """Return what `text` names, seen from `folder` (the current one), else among what ships; None if it is neither."""
    path = (folder or Path()) / Path(text).expanduser()
    return path if path.exists() else _among_shipped(text)


def local(text: str | Path) -> Path:
    """Return what `text` names from here or among what ships; the path as it is written if there is nothing."""
    return find(text) or Path(text).expanduser()


def looks_local(text: str, folder: Path | None = None, *, files: bool = False) -> bool:
    """Tell whether a `text` under which nothing is found must have been meant as a path, and not as a hub id.

    A hub id is owner/name. Words that start like a path, end like a file, or begin with a folder that exists here (or
    that people call their own, such as runs/) are paths: the hub is not asked for them.

    files: owner/name/file is no path either, but a file of a repository.
    """
    owner, *rest = text.split("/")
    repository = f"{owner}/{rest[0]}" if files and len(rest) == 2 else text
    if HUB_ID.fullmatch(repository) is None or Path(repository).suffix.lower() in FILE_SUFFIXES:
        return True
    return owner in OWN or ((folder or Path()) / owner).is_dir()


def is_hub_id(text: object) -> bool:
    """Tell whether `text` names a repository of the hub: owner/name, and nothing of that name is on this machine."""
    return isinstance(text, str) and find(text) is None and not looks_local(text)


def anchor(text: str, folder: Path | None = None, *, files: bool = False) -> str:
    """Return a path written in a file of `folder` as it is written from here; hub ids stay as they are.

    folder: None for a file that ships: what it names ships too, or lies where its user stands.
    files: as of `looks_local`.
    """
    home = folder or Path()
    found = (_among_shipped(text) if folder is None else None) or find(text, home)
    if found is None and not looks_local(text, home, files=files):
        return text
    return str(_from_here(found or home / Path(text).expanduser()))


def _among_shipped(text: str | Path) -> Path | None:
    path = shipped() / text
    return path if Path(text).parts[:1] in [(kind,) for kind in KINDS] and path.exists() else None


def portable(text: str, *, files: bool = False) -> str:
    """Return a path that is right in whatever folder one stands: as it ships, or absolute; hub ids stay as they are."""
    path = local(text)
    if is_shipped(path):
        return str(path.absolute().relative_to(shipped()))
    return str(_plain(path)) if path.exists() or looks_local(text, files=files) else text


def _from_here(path: Path) -> Path:
    plain = _plain(path)
    return plain.relative_to(Path.cwd()) if plain.is_relative_to(Path.cwd()) else plain


def _plain(path: Path) -> Path:
    """Return the absolute path without "..", links left as they are."""
    return Path(os.path.abspath(path))
