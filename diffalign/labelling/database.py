"""One SQLite file of tasks and answers. An answer that was taken is on the disk: a kill or a power cut keeps it."""

import hashlib
import sqlite3
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from diffalign.errors import DataError

VERSION = "1"
_ABOUT = "CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);"


class Database(ABC):
    """Keep tasks and what raters said of them, in tables that a subclass names.

    Write-ahead log with synchronous=FULL: every answer is its own transaction, flushed before the call returns.
    """

    schema: ClassVar[str]  # makes the tables; tasks have an id, answers a task, a rater and when they were created
    tasks: ClassVar[str]
    answers: ClassVar[str]

    def __init__(self, file: str | Path):
        """Open the file, making it if it is missing; raise DataError if it is something else."""
        self.file = Path(file)
        self._lock = threading.Lock()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.file, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(_ABOUT + self.schema)
            self._db.execute("INSERT OR IGNORE INTO about VALUES ('version', ?)", (VERSION,))
        except (sqlite3.DatabaseError, OSError) as error:
            raise DataError(f"{self.file} is no file of votes ({error}). Name another.") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def prompt_of(self, number: int) -> str:
        """Return what the pictures of a task should show; raise DataError if there is none of that number."""

    def next_task(self, rater: str) -> int | None:
        """Return what the rater judges next: fewest answers first, equal ones in an order of the rater's own."""
        rows = self._unjudged(rater)
        return min(rows, key=lambda row: (row[1], keyed(rater, row[0], "order")))[0] if rows else None

    @abstractmethod
    def answer_of(self, number: int, rater: str) -> Any:
        """Return what the rater said of a task, as the page says it; None if nothing."""

    def previous(self, rater: str, number: int | None) -> int | None:
        """Return the task that the rater judged before the given one; the last one if that is not judged yet.

        Returns None if there is none before it. Nothing is taken back.
        """
        with self._lock:
            rows = self._db.execute(
                f"SELECT task FROM {self.answers} WHERE rater = ? ORDER BY created, rowid", (rater,)
            ).fetchall()
        judged = [int(row[0]) for row in rows]
        before = judged[: judged.index(number)] if number in judged else judged
        return before[-1] if before else None

    def progress(self, rater: str) -> tuple[int, int]:
        """Return how many tasks the rater has judged, and how many there are."""
        with self._lock:
            query = f"SELECT COUNT(*) FROM {self.answers} WHERE rater = ?"
            return int(self._db.execute(query, (rater,)).fetchone()[0]), self.count()

    def count(self) -> int:
        """Return how many tasks there are."""
        return int(self._db.execute(f"SELECT COUNT(*) FROM {self.tasks}").fetchone()[0])

    def _unjudged(self, rater: str) -> list[tuple[int, int]]:
        """Return the tasks that the rater has not judged, and how many answers each has."""
        with self._lock:
            return self._db.execute(
                f"SELECT t.id, (SELECT COUNT(*) FROM {self.answers} v WHERE v.task = t.id) FROM {self.tasks} t "
                f"WHERE NOT EXISTS (SELECT 1 FROM {self.answers} v WHERE v.task = t.id AND v.rater = ?)",
                (rater,),
            ).fetchall()


def keyed(rater: str, number: int, what: str) -> int:
    """Return a number of 64 bits that looks random and is the same each time it is asked for."""
    digest = hashlib.sha256(f"{what}\0{rater}\0{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
