"""Which files of a folder are pictures, in which order, and which files data may name: the same for every command."""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePath
from typing import Self

from diffalign.errors import UserError
from diffalign.text_files import possible_name, shown
from reward_models.pictures import SUFFIXES

__all__ = ["SUFFIXES", "OutsideError", "Reach", "is_hidden", "is_picture", "listed", "natural", "nfc", "pick", "tell"]

_log = logging.getLogger(__name__)
_told: set[str] = set()  # a folder is listed more than once in a run
# Pictures to a person, but nothing here reads them; .heic and .avif are in SUFFIXES where a reader is installed.
_UNREAD = frozenset(
    ".heic .heics .heif .heifs .hif .avif .avifs .jxl .psd .svg .eps .ps .pdf .ai .tga .ico .icns .dds .exr .hdr .dng "
    ".cr2 .cr3 .nef .arw .orf .rw2 .raf .raw".split()
)
_LIBRARIES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin", ".avif": "pillow>=11.3"}


class OutsideError(UserError):
    """Report a file that data may not name."""


@dataclass(frozen=True)
class Reach:
    """Say which files the data in `folder` may name: those below it and below `wider`, links followed.

    In a snapshot of the hub's cache files are links into the blobs of the same repository, which belong to it.
    """

    folder: Path  # where relative names start
    wider: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: Path, root: Path | None) -> Self:
        """Return what the data in `folder` may name, given the folder that a user has named besides, or None."""
        return cls(folder, () if root is None else (root,))

    @cached_property
    def _roots(self) -> tuple[str, ...]:
        folder = Path(os.path.abspath(self.folder))
        snapshots = (above.parent for above in folder.parents if above.name == "snapshots")
        repositories = [above for above in snapshots if (above / "blobs").is_dir()]
        return tuple(os.path.realpath(root) for root in (folder, *self.wider, *repositories))

    def file(self, name: str | Path) -> Path:
        """Return the file that `name` is; raise OutsideError where it leads out, or can be no name of a file."""
        if not possible_name(name):
            raise OutsideError(f"no file can be called {str(name)[:80]!r}")
        path = _as_on_disk(self.folder / name)
        if not self.holds(path):
            raise OutsideError(
                f"{path} leads out of {self.folder}; name a folder that holds both with --root (data.root in a "
                "configuration) where that is meant"
            )
        return path

    def finds(self, name: str | Path) -> bool:
        """Tell whether there is a file of this name that data may name."""
        try:
            return os.path.isfile(self.file(name))
        except OutsideError:
            return False

    def holds(self, path: Path) -> bool:
        """Tell whether a file lies where the data may reach."""
        folder, name = os.path.split(path)
        whole = name in ("", os.curdir, os.pardir) or os.path.islink(path)
        real = os.path.realpath(path) if whole else os.path.join(_real(folder or os.curdir, os.getcwd()), name)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._roots)


def listed(folder: Path, reach: Reach | None = None) -> list[Path]:
    """Return the pictures of a folder in natural order, and tell in one line what was left out.

    Hidden files (those of macOS, ._a.png, too), what is no regular file, kinds that cannot be read, and links that
    lead out of `reach`, by default the folder, are left out. Other files, such as captions, are none of its business.
    """
    return pick(folder, folder.iterdir(), reach or Reach(folder))


def pick(folder: Path, paths: Iterable[Path], reach: Reach) -> list[Path]:
    """Return the pictures among paths below a folder as `listed` does."""
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES or suffix in _UNREAD:
            reason = _fault(path, path.relative_to(folder), suffix, reach)
            if reason is None:
                found.append(path)
            else:
                left_out[reason] += 1
    tell(folder, left_out)
    return sorted(found, key=natural)


def tell(where: object, left_out: Counter[str]) -> None:
    """Tell once what was left out of the pictures of a place."""
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        message = f"{shown(str(where))}: left out {left_out.total()} file(s): {reasons}."
        if message not in _told:
            _told.add(message)
            _log.warning("%s", message)


def is_picture(name: str | PurePath) -> bool:
    """Tell by the end of its name, in any case, whether a file is a picture that can be read."""
    return PurePath(name).suffix.lower() in SUFFIXES


def is_hidden(path: PurePath) -> bool:
    """Tell whether a relative path names a hidden file, or one in a hidden folder or in that of macOS's archives."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in path.parts)


def natural(path: PurePath) -> tuple[list[tuple[int, int | str]], str]:
    """Return a key that sorts 2 before 10, equally on every file system."""
    parts = re.split(r"([0-9]+)", nfc(str(path)))
    key = [(0, int(part[-4000:])) if index % 2 else (1, part.lower()) for index, part in enumerate(parts)]
    return key, str(path)


def nfc(name: str) -> str:
    """Return a name with composed letters: macOS writes an e and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def _fault(path: Path, name: PurePath, suffix: str, reach: Reach) -> str | None:
    if is_hidden(name):
        return "hidden"
    if suffix not in SUFFIXES:
        library = f" without a reader (pip install {_LIBRARIES[suffix]})" if suffix in _LIBRARIES else " not read"
        return f"{suffix}{library}"
    if not reach.holds(path):
        return "leading out of the folder"
    return None if os.path.isfile(path) else "no regular file"


def _as_on_disk(path: Path) -> Path:
    """Return the path as the disk spells it: data and file systems differ in how they write accents."""
    if not os.path.lexists(path):
        for form in ("NFC", "NFD"):
            if os.path.lexists(other := unicodedata.normalize(form, str(path))):
                return Path(other)
    return path


@lru_cache(4096)
def _real(folder: str, here: str) -> str:
    return os.path.realpath(folder)
