"""One command at a time in a folder: the second one is told who is at work there.

The system lets go of the lock when its holder ends, however it ends; the file stays and means nothing by itself.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there
    fcntl = None

FILE = ".lock"
_held: set[Any] = set()  # files of this process, which helpers that it forks must not hold on to


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep every other command out of `folder`, which is made if missing.

    Where the file system knows no locks, nobody is kept out.

    Raises:
        ConfigError: another command works there, or the folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE).open("a+", encoding="utf8")
    except OSError as error:
        raise ConfigError(f"Cannot write into {folder}: {error.strerror or error}. Name another folder.") from error
    with file:
        _take(file, folder)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            _write(file, "")
            _release(file)


def _take(file: Any, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is in use{_holder(file)}. Wait until that has ended or stop it, or name another folder."
        ) from None
    except OSError:  # a network file system without locks
        return
    who = {"host": socket.gethostname(), "pid": os.getpid(), "command": " ".join(sys.argv)}
    _write(file, json.dumps(who | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))


def _release(file: Any) -> None:
    """Unlock, not only close: a helper forked a moment ago may not have closed its copy yet."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def _holder(file: Any) -> str:
    """Word who has written their name into the file."""
    file.seek(0)
    try:
        who = json.loads(file.read())
        return f' by process {who["pid"]} on {who["host"]} since {who["since"]}: "{who["command"]}"'
    except (ValueError, KeyError, TypeError):
        return ""


def _write(file: Any, text: str) -> None:
    try:
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()
    except OSError:  # a full disk: the lock holds without a name
        pass


def _let_go() -> None:
    """Close the files in a forked process; the lock stays with its parent, and ends with it."""
    for file in _held:
        os.close(file.fileno())
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
