"""Tasks and votes in one SQLite file. A vote that was answered for is on the disk: a kill or a power cut keeps it."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd

from diffalign.errors import DataError
from diffalign.labelling.database import Database, keyed

Choice = Literal["left", "right", "tie"]
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    model_a TEXT NOT NULL, file_a TEXT NOT NULL, model_b TEXT NOT NULL, file_b TEXT NOT NULL,
    UNIQUE (file_a, file_b)
);
CREATE TABLE IF NOT EXISTS votes (
    task INTEGER NOT NULL REFERENCES tasks (id), rater TEXT NOT NULL, credit REAL NOT NULL,
    left TEXT NOT NULL, seconds REAL, created REAL NOT NULL, PRIMARY KEY (task, rater)
);
"""
_CREDIT = {"a": 1.0, "b": 0.0}


@dataclass(frozen=True)
class Task:
    """Hold two pictures of one prompt by two models; a rater sees only the pictures."""

    prompt_id: int
    prompt: str
    seed: int
    model_a: str
    file_a: str
    model_b: str
    file_b: str


class Votes(Database):
    """Keep pairs of pictures and which of the two raters chose."""

    schema: ClassVar[str] = _SCHEMA
    tasks: ClassVar[str] = "tasks"
    answers: ClassVar[str] = "votes"

    def add(self, tasks: Iterable[Task]) -> int:
        """Add the tasks that are not there yet; return how many were new."""
        with self._lock:
            before = self.count()
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR IGNORE INTO tasks (prompt_id, prompt, seed, model_a, file_a, model_b, file_b) "
                "VALUES (:prompt_id, :prompt, :seed, :model_a, :file_a, :model_b, :file_b)",
                (asdict(task) for task in tasks),
            )
            self._db.execute("COMMIT")
            return self.count() - before

    def task(self, number: int) -> Task:
        """Return a task; raise DataError if there is none of that number."""
        with self._lock:
            row = self._db.execute(
                "SELECT prompt_id, prompt, seed, model_a, file_a, model_b, file_b FROM tasks WHERE id = ?", (number,)
            ).fetchone()
        if row is None:
            raise DataError(f"There is no task {number} in {self.file}.")
        return Task(*row)

    def prompt_of(self, number: int) -> str:
        """Return what the pictures of a task should show."""
        return self.task(number).prompt

    def left_of(self, number: int, rater: str) -> Literal["a", "b"]:
        """Return which picture the rater sees on the left: a coin that falls the same way each time it is asked."""
        return "a" if keyed(rater, number, "side") % 2 else "b"

    def file_of(self, number: int, rater: str, side: Literal["left", "right"]) -> Path:
        """Return the picture on one side."""
        task, left = self.task(number), self.left_of(number, rater)
        shows_a = (side == "left") == (left == "a")
        return Path(task.file_a if shows_a else task.file_b)

    def vote(self, number: int, rater: str, choice: Choice, seconds: float | None = None) -> None:
        """Keep a vote; one on the same task by the same rater is replaced in its place. It is on the disk then."""
        self.task(number)
        left = self.left_of(number, rater)
        right = "b" if left == "a" else "a"
        credit = 0.5 if choice == "tie" else _CREDIT[left if choice == "left" else right]
        with self._lock:
            self._db.execute(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (task, rater) DO UPDATE SET "
                "credit = excluded.credit, left = excluded.left, seconds = excluded.seconds",
                (number, rater, credit, left, seconds, time.time()),
            )

    def answer_of(self, number: int, rater: str) -> Choice | None:
        """Return the rater's vote on a task."""
        with self._lock:
            row = self._db.execute(
                "SELECT credit, left FROM votes WHERE task = ? AND rater = ?", (number, rater)
            ).fetchone()
        if row is None:
            return None
        credit, left = row
        return "tie" if credit == 0.5 else "left" if _CREDIT[left] == credit else "right"

    def table(self) -> pd.DataFrame:
        """Return one row a vote: task, rater, credit (1: model_a), left, seconds, created, and what its task holds."""
        with self._lock:
            return pd.read_sql_query(
                "SELECT v.task, v.rater, v.credit, v.left, v.seconds, v.created, t.prompt_id, t.prompt, t.seed, "
                "t.model_a, t.file_a, t.model_b, t.file_b "
                "FROM votes v JOIN tasks t ON t.id = v.task ORDER BY v.created, v.rowid",
                self._db,
            )


def pair_tasks(models: Sequence[tuple[str, pd.DataFrame]]) -> list[Task]:
    """Return a task for every prompt, seed and pair of models.

    Args:
        models: names, and tables of prompt_id, prompt, seed and file (absolute).
    """
    tasks = []
    for i, (name_a, a) in enumerate(models):
        for name_b, b in models[i + 1 :]:
            both = a.merge(b, on=["prompt_id", "seed"], suffixes=("_a", "_b"))
            tasks += [
                Task(int(r.prompt_id), r.prompt_a, int(r.seed), name_a, str(r.file_a), name_b, str(r.file_b))
                for r in both.itertuples()
            ]
    return tasks
