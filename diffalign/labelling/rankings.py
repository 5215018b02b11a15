"""Rankings of k pictures of one prompt, in the same SQLite file as votes on two."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from diffalign.errors import DataError
from diffalign.labelling.database import Database, keyed
from diffalign.labelling.store import Votes

MOST = 9  # pictures of a task: one key each
_SCHEMA = """
CREATE TABLE IF NOT EXISTS lists (
    id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    models TEXT NOT NULL, files TEXT NOT NULL UNIQUE
);
CREATE TABLE IF NOT EXISTS rankings (
    task INTEGER NOT NULL REFERENCES lists (id), rater TEXT NOT NULL, ranks TEXT NOT NULL,
    places TEXT NOT NULL, seconds REAL, created REAL NOT NULL, PRIMARY KEY (task, rater)
);
"""


# (all models, the rankings so far as of `Rankings.table`, k) -> k of the models
Propose = Callable[[Sequence[str], pd.DataFrame, int], Collection[str]]


@dataclass(frozen=True)
class PictureList:
    """Hold k pictures of one prompt by k models; a rater sees only the pictures."""

    prompt_id: int
    prompt: str
    seed: int
    models: tuple[str, ...]
    files: tuple[str, ...]


class Rankings(Database):
    """Keep lists of pictures and how raters ranked them; 1 is best, equal ranks are ties."""

    schema: ClassVar[str] = _SCHEMA
    tasks: ClassVar[str] = "lists"
    answers: ClassVar[str] = "rankings"

    def __init__(self, file: str | Path, propose: Propose | None = None):
        """Open the file as `Database` does.

        Args:
            file: of votes; made if missing.
            propose: says of which models the next ranking tells most, where lists have different ones.
        """
        super().__init__(file)
        self._propose = propose

    def add(self, lists: Iterable[PictureList]) -> int:
        """Add the lists that are not there yet; return how many were new."""
        rows = [(x.prompt_id, x.prompt, x.seed, json.dumps(x.models), json.dumps(x.files)) for x in lists]
        with self._lock:
            before = self.count()
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR IGNORE INTO lists (prompt_id, prompt, seed, models, files) VALUES (?, ?, ?, ?, ?)", rows
            )
            self._db.execute("COMMIT")
            return self.count() - before

    def task(self, number: int) -> PictureList:
        """Return a list of pictures; raise DataError if there is none of that number."""
        with self._lock:
            row = self._db.execute(
                "SELECT prompt_id, prompt, seed, models, files FROM lists WHERE id = ?", (number,)
            ).fetchone()
        if row is None:
            raise DataError(f"There is no list {number} in {self.file}.")
        return PictureList(*row[:3], tuple(json.loads(row[3])), tuple(json.loads(row[4])))

    def prompt_of(self, number: int) -> str:
        """Return what the pictures of a list should show."""
        return self.task(number).prompt

    def next_task(self, rater: str) -> int | None:
        """Return what the rater ranks next: of the models proposed, if any; then the lists with fewest answers."""
        rows = self._unjudged(rater)
        of = {number: models for number, models in self._models().items() if number in {row[0] for row in rows}}
        if self._propose is not None and len({frozenset(models) for models in of.values()}) > 1:
            names = list(dict.fromkeys(name for models in self._models().values() for name in models))
            match = set(self._propose(names, self.table(), len(next(iter(of.values())))))
            rows = [row for row in rows if set(of[row[0]]) == match] or rows
        return min(rows, key=lambda row: (row[1], keyed(rater, row[0], "order")))[0] if rows else None

    def places(self, number: int, rater: str) -> list[int]:
        """Return which picture the rater sees at each place: an order of the rater's own, the same each time."""
        count = len(self.task(number).files)
        return sorted(range(count), key=lambda i: keyed(rater, number, f"place {i}"))

    def file_of(self, number: int, rater: str, place: int) -> Path:
        """Return the picture at a place, counted from 0; raise DataError if there is none."""
        files = self.task(number).files
        if not 0 <= place < len(files):
            raise DataError(f"List {number} has {len(files)} pictures, there is no place {place}.")
        return Path(files[self.places(number, rater)[place]])

    def rank(self, number: int, rater: str, ranks: Sequence[int], seconds: float | None = None) -> None:
        """Keep a ranking; one of the same list by the same rater is replaced in its place. It is on the disk then.

        Args:
            ranks: [k] of the pictures at each place; 1 is best, equal ones are ties.

        Raises:
            DataError: not a rank from 1 to k for every picture.
        """
        places = self.places(number, rater)
        if len(ranks) != len(places) or not all(1 <= rank <= len(places) for rank in ranks):
            raise DataError(f"A ranking gives each of {len(places)} pictures a rank from 1 on, got {list(ranks)}.")
        by_model = [0] * len(places)
        for place, rank in zip(places, ranks, strict=True):
            by_model[place] = int(rank)
        with self._lock:
            self._db.execute(
                "INSERT INTO rankings VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (task, rater) DO UPDATE SET "
                "ranks = excluded.ranks, places = excluded.places, seconds = excluded.seconds",
                (number, rater, json.dumps(by_model), json.dumps(places), seconds, time.time()),
            )

    def answer_of(self, number: int, rater: str) -> list[int] | None:
        """Return [k] the ranks that the rater gave the pictures at each place."""
        with self._lock:
            row = self._db.execute(
                "SELECT ranks, places FROM rankings WHERE task = ? AND rater = ?", (number, rater)
            ).fetchone()
        if row is None:
            return None
        ranks, places = map(json.loads, row)
        return [ranks[place] for place in places]

    def table(self) -> pd.DataFrame:
        """Return one row a ranking: task, rater, ranks (in the order of models), and what its list holds."""
        with self._lock:
            table = pd.read_sql_query(
                "SELECT v.task, v.rater, v.ranks, v.seconds, v.created, t.prompt_id, t.prompt, t.seed, t.models, "
                "t.files FROM rankings v JOIN lists t ON t.id = v.task ORDER BY v.created, v.rowid",
                self._db,
            )
        for column in ("ranks", "models", "files"):
            table[column] = table[column].map(json.loads)
        return table

    def _models(self) -> dict[int, list[str]]:
        with self._lock:
            return {number: json.loads(models) for number, models in self._db.execute("SELECT id, models FROM lists")}


def list_tasks(models: Sequence[tuple[str, pd.DataFrame]], k: int) -> list[PictureList]:
    """Return a list for every prompt, seed and choice of k of the models.

    Args:
        models: names, and tables of prompt_id, prompt, seed and file (absolute).
        k: pictures a list.
    """
    tables = {name: table.set_index(["prompt_id", "seed"]) for name, table in models}
    found = []
    for chosen in combinations(tables, k):
        keys = [key for key in tables[chosen[0]].index if all(key in tables[name].index for name in chosen[1:])]
        for key in keys:
            rows = [tables[name].loc[key] for name in chosen]
            found.append(
                PictureList(int(key[0]), rows[0]["prompt"], int(key[1]), chosen, tuple(r["file"] for r in rows))
            )
    return found


def read_votes(file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the votes on two pictures, those that rankings imply among them, and the rankings."""
    if not file.is_file():
        raise DataError(f"There is no file of votes {file}. Collect some: diffalign label FOLDER FOLDER --votes {file}")
    with Votes(file) as votes, Rankings(file) as lists:
        pairs, rankings = votes.table(), lists.table()
    return (pd.concat([pairs, as_votes(rankings)], ignore_index=True) if len(rankings) else pairs), rankings


def as_votes(rankings: pd.DataFrame) -> pd.DataFrame:
    """Return the rankings as votes on every two pictures of a list, in the columns of `Votes.table`.

    A list's task becomes "list 3: 0 1", of its first and second picture.
    """
    rows: list[dict[str, Any]] = []
    for row in rankings.itertuples():
        for i, j in combinations(range(len(row.ranks)), 2):
            a, b = row.ranks[i], row.ranks[j]
            rows.append(
                {
                    "task": f"list {row.task}: {i} {j}",
                    "rater": row.rater,
                    "credit": 0.5 if a == b else float(a < b),
                    "seconds": row.seconds,
                    "created": row.created,
                    "prompt_id": row.prompt_id,
                    "prompt": row.prompt,
                    "seed": row.seed,
                    "model_a": row.models[i],
                    "file_a": row.files[i],
                    "model_b": row.models[j],
                    "file_b": row.files[j],
                }
            )
    return pd.DataFrame(rows)
