"""What is in an uncompressed tar of WebDataset: members cat.jpg and cat.txt belong to the sample "cat"."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffalign.errors import DataError


class Span(NamedTuple):
    """Point at a stretch of a file: a member of a tar shard."""

    file: str
    offset: int  # bytes
    size: int  # bytes

    def read(self) -> bytes:
        """Return the bytes; raise OSError where the file ends before them."""
        with open(self.file, "rb") as opened:
            opened.seek(self.offset)
            content = opened.read(self.size)
        if self.size > len(content):
            raise OSError(f"{self.file} ends in the middle of it")
        return content


class Member(NamedTuple):
    """Hold where a file of a tar is, and which sample it belongs to."""

    name: str
    key: str  # what the members of a sample share: the name up to the first dot
    field: str  # what follows that dot, in small letters: "jpg", "jpg_0.jpg", "json"
    span: Span

    @property
    def suffix(self) -> str:
        """Return the ending with its dot."""
        return f".{self.field.rpartition('.')[2]}" if self.field else ""


def members(file: Path) -> Iterator[Member]:
    """Yield the files of a tar in order; one that breaks off ends there, its last member maybe cut.

    Raises:
        DataError: it is no tar, or is compressed.
    """
    found = 0
    try:
        with tarfile.open(file, "r:") as tar:
            for entry in tar:
                tar.members = []  # it keeps every header otherwise
                path = PurePosixPath(entry.name)
                stem, _, field = path.name.partition(".")
                if entry.isfile() and stem:
                    found += 1
                    span = Span(str(file), entry.offset_data, entry.size)
                    yield Member(entry.name, str(path.parent / stem), field.lower(), span)
    except (tarfile.TarError, OSError) as error:
        if not found:
            raise DataError(f"Cannot read {file} as a tar shard ({error}). Compressed shards: gunzip first.") from error
