"""Keep what was answered, so that no question is asked twice: also not by a command that was killed and run again."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

from diffalign.captioning.base import Answered, Captioner, Missing, Question
from diffalign.data.fingerprints import digest_bytes
from diffalign.errors import DataError

_TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (asked BLOB, question BLOB, text TEXT NOT NULL, "
    "PRIMARY KEY (asked, question)) WITHOUT ROWID"
)


class Answers:
    """Remember answers in an SQLite file, by who was asked and what."""

    def __init__(self, file: Path):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(file)
            self._database.execute(_TABLE)
        except sqlite3.Error as error:
            raise DataError(f"Cannot use {file} ({error}). Delete it to ask everything anew.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def get(self, asked: str, question: Question) -> str | None:
        """Return the answer to a question, or None where it is not known."""
        wanted = (digest_bytes(asked.encode()), question.key)
        row = self._database.execute("SELECT text FROM answers WHERE asked = ? AND question = ?", wanted).fetchone()
        return row[0] if row else None

    def put(self, asked: str, answered: Answered) -> None:
        """Keep answers, all or none of them; missing ones are asked for again."""
        who = digest_bytes(asked.encode())
        rows = [(who, question.key, text) for question, text in answered if isinstance(text, str)]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise DataError(f"Cannot write {self.file} ({error}). What was answered before is kept.") from error


def ask(
    captioner: Captioner,
    questions: Sequence[Question],
    known: Answers,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str | Missing]:
    """Return the answers to questions; those that are not known are asked for once each and kept.

    Args:
        captioner: whom to ask.
        questions: with or without repeats.
        known: what was answered before.
        advance: told how many more questions are done.
    """
    distinct = {question.key: question for question in questions}
    found: dict[bytes, str | Missing] = {}
    for key, question in distinct.items():
        if (text := known.get(captioner.asked, question)) is not None:
            found[key] = text
    todo = [question for key, question in distinct.items() if key not in found]
    advance(len(questions) - len(todo))
    if todo:
        with closing(captioner.answers(todo)) as batches:
            for answered in batches:
                known.put(captioner.asked, answered)
                found.update((question.key, text) for question, text in answered)
                advance(len(answered))
    return [found[question.key] for question in questions]
