"""Encoded pictures of a data set in one file, so that any of them is read in a moment and none is held in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffalign.errors import DataError


@dataclass(frozen=True)
class Stored:
    """Say where in a file a picture lies."""

    file: Path
    start: int
    size: int

    def read_bytes(self) -> bytes:
        """Return the encoded picture."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


class Pictures:
    """Add pictures to a file, one after another."""

    def __init__(self, file: Path, stream: BinaryIO):
        self._file, self._stream, self._end = file, stream, 0

    def add(self, content: bytes) -> Stored:
        """Return where `content` now lies."""
        try:
            self._stream.write(content)
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self._file, error) from error
        stored = Stored(self._file, self._end, len(content))
        self._end += len(content)
        return stored


@contextmanager
def storing(file: Path) -> Iterator[Pictures]:
    """Yield what keeps pictures in `file` until the context ends; what a killed run left there is replaced.

    Raises:
        DataError: the disk is full, or the folder may not be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("wb")
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        with stream:
            yield Pictures(file, stream)
    finally:
        file.unlink(missing_ok=True)


def _unwritable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"Cannot write {file}, which keeps the pictures while they are trained on: {error.strerror or error}. Make "
        "room, or choose another folder."
    )
