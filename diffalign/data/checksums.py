"""Checksums of what lies on a disk for long: a bit that turns there must not be trained on."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffalign.errors import DataError

SUFFIX = ".crc.npy"  # of an array's file: one CRC-32 for each of its rows
CHUNK = 1 << 22


def file_of(name: str) -> str:
    """Return the name of the file with the checksums of an array."""
    return f"{name.removesuffix('.npy')}{SUFFIX}"


def of_rows(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return a CRC-32 [N] uint32 of the bytes of each of N arrays."""
    return np.array([zlib.crc32(np.ascontiguousarray(row)) for row in rows], dtype=np.uint32)


def of_file(file: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with file.open("rb") as stream:
        while part := stream.read(CHUNK):
            found = zlib.crc32(part, found)
    return found


def open_for(array: Path, count: int) -> np.ndarray | None:
    """Return the checksums of an array of `count` rows; None if it has none, as those before 2026-12."""
    file = array.with_name(file_of(array.name))
    if not file.exists():
        return None
    found = np.load(file)
    return found if len(found) == count else None  # begun by a version without them


def require(rows: Iterable[np.ndarray], expected: np.ndarray, file: Path) -> None:
    """Raise DataError unless the rows of `file` that were read have their checksums."""
    if (of_rows(rows) != expected).any():
        raise damaged(file)


def damaged(file: Path) -> DataError:
    """Return the error of a file that is not what was written."""
    return DataError(
        f"{file} is damaged: by its checksum it is not what was written. Delete {file.parent} and build it again: the "
        "disk may be failing."
    )
