"""Proof that a folder is whole: the size and SHA-256 of every file in it, written last, when all is on the disk."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffalign.data.cache_store import read_json, write_json

MANIFEST = "manifest.json"
THREADS = 4  # hashlib lets go of the interpreter: files are hashed beside each other


def seal(folder: Path, **said: Any) -> None:
    """Force every file of `folder` to the disk, and write beside them what they are, with what is `said` of them."""
    files = _files(folder)
    for file in files:
        sync(file)
    found = {
        file.name: {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _digests(files), strict=True)
    }
    write_json(folder / MANIFEST, {**said, "files": found}, sync=True)
    sync(folder)


def is_sealed(folder: Path) -> bool:
    """Tell whether a manifest lies in `folder`, whatever it says."""
    return (folder / MANIFEST).exists()


def fault(folder: Path, *, thorough: bool = True) -> str | None:
    """Say in words how a folder differs from its manifest; None if it does not.

    thorough: read and hash every byte; otherwise only names and sizes are looked at.
    """
    record = read_json(folder / MANIFEST)
    wanted = record.get("files") if isinstance(record, dict) else None
    if not isinstance(wanted, dict) or not all(isinstance(told, dict) for told in wanted.values()):
        return f"{MANIFEST} cannot be read"
    files = {file.name: file for file in _files(folder)}
    for name, told in wanted.items():
        if name not in files:
            return f"{name} is missing"
        size = files[name].stat().st_size
        if size != told.get("size"):
            return f"{name} has {size} bytes, {told.get('size')} were written"
    if not thorough:
        return None
    digests = _digests([files[name] for name in wanted])
    return next(
        (
            f"{name} is not what was written, by its SHA-256"
            for (name, told), digest in zip(wanted.items(), digests, strict=True)
            if told.get("sha256") != digest
        ),
        None,
    )


def said(folder: Path, key: str) -> Any:
    """Return what was said of a folder when it was sealed; None if nothing was."""
    return (read_json(folder / MANIFEST) or {}).get(key)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk: what a crash of the machine then leaves."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)


def _digests(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
