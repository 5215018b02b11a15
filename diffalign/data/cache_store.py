"""Append-only arrays on disk that survive a killed process: the files under a latent cache."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffalign.data import checksums
from diffalign.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: two builds of one cache at the same time are not kept apart there
    fcntl = None

HEADER_BYTES = 192  # .npy header of fixed length, so that the number of rows can be written last
SYNC_SECONDS = 30.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

COMPLETE, PROGRESS, SYNCED = "complete.json", "progress.json", "progress.synced.json"


class AppendStore:
    """Grow .npy arrays and line files together, in commits.

    What is committed survives `kill -9`: on reopening, every file is cut back to the last commit. Against power loss,
    files are synced to disk every 30 s; after a reboot the last synced commit counts, as later data may be lost.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        progress = self._last_progress()
        self.arrays: dict[str, dict[str, Any]] = progress["arrays"]  # name -> dtype, shape of a row, rows
        self.lines: dict[str, int] = progress["lines"]  # name -> bytes
        self.state: dict[str, Any] = progress["state"]
        self._files: dict[str, Any] = {}
        self._synced = time.monotonic()
        self._cut()

    def _last_progress(self) -> dict[str, Any]:
        latest, synced = read_json(self.folder / PROGRESS), read_json(self.folder / SYNCED)
        if latest and latest["boot"] and latest["boot"] == _boot():
            return latest
        return synced or {"arrays": {}, "lines": {}, "state": {}}

    def _cut(self) -> None:
        """Drop what was written after the last commit."""
        sizes = self._sizes()
        for path in self.folder.iterdir():
            if path.suffix in (".npy", ".jsonl") and path.name not in sizes:
                path.unlink()
        for path, size in ((self.folder / name, size) for name, size in sizes.items()):
            if not path.exists() or path.stat().st_size < size:
                raise DataError(f"{path} is shorter than was recorded. Delete {self.folder} and build it again.")
            os.truncate(path, size)

    def _sizes(self) -> dict[str, int]:
        """Return the size in bytes each file has or is to have."""
        sizes = dict(self.lines)
        for name, spec in self.arrays.items():
            row = np.dtype(spec["dtype"]).itemsize * int(np.prod(spec["shape"]))
            sizes[name] = HEADER_BYTES + spec["rows"] * row
        return sizes

    def rows(self, name: str) -> int:
        """Return how many rows an array has."""
        return self.arrays.get(name, {"rows": 0})["rows"]

    def append(self, name: str, array: np.ndarray) -> None:
        """Append rows to the array file `name` (.npy). Raises DataError when the disk is full."""
        spec = self.arrays.setdefault(name, {"dtype": array.dtype.str, "shape": list(array.shape[1:]), "rows": 0})
        if spec["dtype"] != array.dtype.str or spec["shape"] != list(array.shape[1:]):
            raise DataError(
                f"{self.folder / name} has rows {spec['shape']} {spec['dtype']}, but the encoder now gives "
                f"{list(array.shape[1:])} {array.dtype.str}. Its fingerprint must change with what it returns."
            )
        with self._reporting(name):
            self._open(name, HEADER_BYTES).write(np.ascontiguousarray(array).data)
        spec["rows"] += len(array)

    def append_lines(self, name: str, values: Sequence[Any]) -> None:
        """Append JSON lines to the file `name` (.jsonl)."""
        data = "".join(json.dumps(value) + "\n" for value in values).encode()
        with self._reporting(name):
            self._open(name, 0).write(data)
        self.lines[name] = self.lines.get(name, 0) + len(data)

    def _open(self, name: str, skip: int):
        if name not in self._files:
            path = self.folder / name
            path.touch()
            self._files[name] = open(path, "r+b")
            self._files[name].seek(max(skip, path.stat().st_size))
        return self._files[name]

    def read(self, name: str) -> np.ndarray | None:
        """Return the committed rows of an array, or None if it has none."""
        if not self.rows(name):
            return None
        spec = self.arrays[name]
        shape = (spec["rows"], *spec["shape"])
        with open(self.folder / name, "rb") as file:
            file.seek(HEADER_BYTES)
            return np.fromfile(file, spec["dtype"], int(np.prod(shape))).reshape(shape)

    def read_lines(self, name: str) -> list[Any]:
        """Return the committed lines of a file."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_bytes().splitlines()] if name in self.lines else []

    def describe(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file beside the arrays. Raises DataError when the disk is full."""
        with self._reporting(name):
            write_json(self.folder / name, value)

    def commit(self, **state: Any) -> None:
        """Make everything appended so far, and `state`, what a later process continues from."""
        self.state |= state
        with self._reporting(PROGRESS):
            for file in self._files.values():
                file.flush()
            record = {"boot": _boot(), "arrays": self.arrays, "lines": self.lines, "state": self.state}
            write_json(self.folder / PROGRESS, record)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
                write_json(self.folder / SYNCED, record, sync=True)

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        self._synced = time.monotonic()

    def finish(self, meta: dict[str, Any], drop: Sequence[str] = ()) -> None:
        """Write the headers, then the mark of completion with `meta` and all sizes; remove the files in `drop`."""
        with self._reporting(COMPLETE):
            for name, spec in self.arrays.items():
                file = self._open(name, HEADER_BYTES)
                file.seek(0)
                file.write(_header(spec["dtype"], (spec["rows"], *spec["shape"])))
            for file in self._files.values():
                file.flush()
            self._sync()
            sizes = {name: size for name, size in sorted(self._sizes().items()) if name not in drop}
            # Of what is read row by row each row has a checksum of its own.
            found = {
                name: checksums.of_file(self.folder / name) for name in sizes if checksums.file_of(name) not in sizes
            }
            write_json(self.folder / COMPLETE, {**meta, "files": sizes, "checksums": found}, sync=True)
        self.close()
        for name in (PROGRESS, SYNCED, *drop):
            (self.folder / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was not committed is dropped by the next process."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                continue  # a full disk was reported when it was met
        self._files = {}

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"Cannot write {self.folder / name}: {error.strerror}. What was finished is intact: make room "
                "(or choose another cache directory) and run again to continue."
            ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's content, or None when it is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: dict[str, Any], sync: bool = False) -> None:
    """Replace a JSON file in one step; `sync` makes it survive power loss."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=None if path.name.startswith("progress") else 1) + "\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time work in `folder`; others wait. The lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise DataError(f"Cannot make the folder {folder}: {error.strerror}. Choose another directory.") from error
    with file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _boot() -> str | None:
    """Identify the running system since its last start; None where that is unknown."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    room = HEADER_BYTES - 10  # magic, version, length
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"
