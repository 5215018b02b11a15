"""How unusable rows are accounted for: counted, and raised or listed in a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.pairs import Place, RowError
from diffalign.errors import DataError


@dataclass
class Counts:
    """Count rows as the reader meets them."""

    unit: str = "pairs"  # what a usable row is called: pairs, lists or images
    rows: int = 0  # rows read
    pairs: int = 0  # usable rows, as far as can be told without decoding images
    ties: int = 0  # rows without a winner: dropped
    unlabelled: int = 0  # rows without a label: dropped
    skipped: dict[str, int] = field(default_factory=dict)  # unusable rows by reason, with on_error="skip"

    def __str__(self) -> str:
        parts = [f"{self.rows} rows", f"{self.pairs} {self.unit}", f"{self.ties} ties dropped"]
        if self.unlabelled:
            parts.append(f"{self.unlabelled} unlabelled rows dropped")
        parts += [f"{number} skipped ({reason})" for reason, number in sorted(self.skipped.items())]
        return ", ".join(parts)


class Rejects:
    """Decide what happens to an unusable row: raise, or count it and list it in a JSONL file.

    Args:
        on_error: "raise" or "skip".
        error_log: JSONL file {"file", "row", "reason", "detail"}; written anew, and only if there is something to list.
    """

    def __init__(self, on_error: str = "raise", error_log: str | Path | None = None):
        if on_error not in ("raise", "skip"):
            raise DataError(f'on_error must be "raise" or "skip", got "{on_error}".')
        self.on_error, self.error_log = on_error, Path(error_log) if error_log else None
        self.counts = Counts()
        self.listed: list[RowError] = []
        self.told = 0  # of those listed, as many have been told to the user
        self.listener: Callable[[], None] | None = None  # is called after a row was recorded
        self._places: set[Place] = set()

    def add(self, error: RowError) -> None:
        """Raise `error`, or record it once if bad rows may be skipped."""
        if self.on_error == "raise":
            raise error
        if error.place in self._places:
            return
        self._places.add(error.place)
        self.listed.append(error)
        self.counts.skipped[error.reason] = self.counts.skipped.get(error.reason, 0) + 1
        if self.error_log is not None:
            self.error_log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.error_log, "w" if len(self.listed) == 1 else "a", encoding="utf-8") as file:
                file.write(json.dumps(as_record(error)) + "\n")
        if self.listener is not None:
            self.listener()


def as_record(error: RowError) -> dict[str, Any]:
    """Return the line that stands for `error` in an error log."""
    return {**error.place._asdict(), "reason": error.reason, "detail": error.detail}


def from_record(record: dict[str, Any]) -> RowError:
    """Return the error a line of an error log stands for."""
    return RowError(Place(record["file"], record["row"], record["unit"]), record["reason"], record["detail"])


def length_error(place: Place, found: int, expected: int) -> RowError:
    """Return the error of a list that is longer or shorter than the first."""
    detail = f"the list has {found} images, but the first of this data set has {expected}; all must have as many"
    return RowError(place, "list length", detail)
