"""Content hashes: what a file holds, not when it was written."""

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from diffalign.errors import DataError
from diffalign.text_files import shown

CHUNK = 1 << 22
# A file this young may change again within the clock tick of its time stamp, unseen: do not remember its hash yet.
RACY_SECONDS = 2.0


def digest_bytes(data: bytes) -> bytes:
    """Hash bytes to 16 bytes (blake2b)."""
    return hashlib.blake2b(data, digest_size=16).digest()


def stable_id(prompt: str, *digests: bytes) -> int:
    """Hash a prompt and image digests to an int in [0, 2**63)."""
    hasher = hashlib.blake2b(prompt.encode(), digest_size=8)
    for digest in digests:
        hasher.update(b"\x00" + digest)
    return int.from_bytes(hasher.digest(), "big") >> 1


def digest_files(paths: Sequence[Path], memo: Path | None = None, workers: int = 4) -> list[str]:
    """Hash the contents of files, in order, as hexadecimal.

    Args:
        paths: the files.
        memo: an SQLite file that remembers hashes, so that an untouched file is read once only. It is trusted only
            while size, both time stamps and inode are unchanged; a touched file is read again.
        workers: threads that read and hash.

    Raises:
        DataError: when a file cannot be read.
    """
    stamps = [_stamp(path) for path in paths]
    known = _recall(memo, stamps)
    todo = [path for path, stamp in zip(paths, stamps, strict=True) if stamp not in known]
    with ThreadPoolExecutor(workers) as pool:
        fresh = dict(zip(todo, pool.map(_digest_file, todo), strict=True))
    if fresh:
        _remember(memo, {_stamp(path): digest for path, digest in fresh.items()})
    return [fresh[path] if path in fresh else known[stamp] for path, stamp in zip(paths, stamps, strict=True)]


def digest_images(examples: Sequence[Sequence[Path]], memo: Path | None = None) -> dict[str, Any]:
    """Hash the image files of examples, in order: {"files": how many distinct ones, "blake2b": hexadecimal}."""
    images = sorted({path for example in examples for path in example})
    digests = dict(zip(images, digest_files(images, memo), strict=True))
    content = hashlib.blake2b(digest_size=16)
    for example in examples:
        content.update("".join(digests[path] for path in example).encode())
    return {"files": len(images), "blake2b": content.hexdigest()}


def _digest_file(path: Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return hasher.hexdigest()


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return f"{shown(path.absolute())}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _recall(memo: Path | None, stamps: Sequence[str]) -> dict[str, str]:
    if memo is None or not memo.exists():
        return {}
    found = {}
    try:
        with closing(sqlite3.connect(memo, timeout=10)) as database:
            for stamp in stamps:
                row = database.execute("SELECT digest FROM digests WHERE stamp = ?", (stamp,)).fetchone()
                if row is not None:
                    found[stamp] = row[0]
    except sqlite3.Error:
        return {}  # the memo only saves time: without it every file is read
    return found


def _remember(memo: Path | None, digests: dict[str, str]) -> None:
    settled = (time.time() - RACY_SECONDS) * 1e9
    rows = [(s, d) for s, d in digests.items() if all(int(t) < settled for t in s.rsplit("|", 2)[1:])]
    if memo is None or not rows:
        return
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(memo, timeout=10)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS digests (stamp TEXT PRIMARY KEY, digest TEXT)")
            database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?)", rows)
    except (sqlite3.Error, OSError):
        return
