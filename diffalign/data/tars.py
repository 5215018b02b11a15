"""What is in an uncompressed tar of WebDataset: members cat.jpg and cat.txt belong to the sample "cat"."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffalign.errors import DataError
from diffalign.pictures import is_hidden, is_picture, nfc, tell
from diffalign.text_files import MOST_CHARACTERS, decode
from reward_models.pictures import PictureError, open_regular, read

MOST_TEXT = 4 * MOST_CHARACTERS  # bytes of a caption
SPARSE = "it is a sparse member, whose bytes do not stand in one place; pack the tar without --sparse"


class Span(NamedTuple):
    """Point at a stretch of a file: a member of a tar shard."""

    file: str
    offset: int  # bytes
    size: int  # bytes

    def read(self) -> bytes:
        """Return the bytes; raise OSError where the file is gone, PictureError where it ends before them."""
        return read(*self)


class Member(NamedTuple):
    """Hold where a file of a tar is, and which sample it belongs to."""

    name: str
    key: str  # what the members of a sample share: the name up to the first dot
    field: str  # what follows that dot, in small letters: "jpg", "jpg_0.jpg", "json"
    span: Span
    fault: str | None = None  # why it cannot be read where it lies

    @property
    def suffix(self) -> str:
        """Return the ending with its dot."""
        return f".{self.field.rpartition('.')[2]}" if self.field else ""

    def text(self) -> str:
        """Return the text that it holds; raise DataError where it is none, as long as a book, or cut."""
        if self.fault or self.span.size > MOST_TEXT:
            raise DataError(f"{self.name}: {self.fault or f'{self.span.size} bytes are no caption'}.")
        try:
            return decode(self.span.read(), self.name)
        except (OSError, PictureError) as error:
            raise DataError(f"{self.name}: {error}.") from error


def members(file: Path) -> Iterator[Member]:
    """Yield the files of a tar in order, hidden ones left out; one that breaks off ends there, its last maybe cut.

    Raises:
        DataError: it is no tar, or is compressed.
    """
    found, left_out = 0, Counter[str]()
    try:
        with open_regular(file) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for entry in tar:
                tar.members = []  # it keeps every header otherwise
                if not entry.isfile():
                    continue
                member = _member(file, entry)
                if member is None:
                    left_out["hidden"] += is_picture(entry.name)
                    continue
                found += 1
                yield member
    # of absurd headers, too
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, PictureError) as error:
        if not found:
            raise DataError(f"Cannot read {file} as a tar shard ({error}). Compressed shards: gunzip first.") from error
    tell(file, +left_out)


def _member(file: Path, entry: tarfile.TarInfo) -> Member | None:
    path = PurePosixPath(entry.name)
    if is_hidden(path.relative_to(path.anchor)):
        return None
    stem, _, field = path.name.partition(".")
    span = Span(str(file), entry.offset_data, entry.size)
    return Member(entry.name, nfc(str(path.parent / stem)), field.lower(), span, SPARSE if entry.issparse() else None)
