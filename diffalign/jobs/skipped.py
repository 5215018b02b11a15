"""What every command says about rows it left out: how many, why, and where they are listed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from diffalign.data import RowError
from diffalign.data.rejects import Rejects
from diffalign.errors import DataError

FILE = "unusable_rows.jsonl"
MOST = 3  # reasons in a message


def told(reasons: Mapping[str, int], total: int, listed: Path | None, unit: str = "rows") -> str:
    """Return the message.

    Args:
        reasons: how many were left out, by why; at least one.
        total: how many there were.
        listed: the file that names them all.
        unit: what they are called.
    """
    count = sum(reasons.values())
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    parts = [f"{number:,} {reason}" for reason, number in ordered[:MOST]]
    if others := sum(number for _, number in ordered[MOST:]):
        parts.append(f"{others:,} for other reasons")
    where = f". Listed in {listed}." if listed else "."
    return f"Left out {count:,} of {total:,} {unit} as unusable: {', '.join(parts)}{where}"


def tell(rejects: Rejects, console: Console) -> None:
    """Say what was left out of a source, unless nothing was since this was last called."""
    if len(rejects.listed) > rejects.told:
        rejects.told = len(rejects.listed)
        say(told(rejects.counts.skipped, rejects.counts.rows, rejects.error_log), console)


def follow(rejects: Rejects, console: Console) -> None:
    """Say from now on when one more row has to be left out, when ten more, a hundred more ..."""
    counts = {len(rejects.listed) + 10**power for power in range(9)}
    rejects.listener = lambda: tell(rejects, console) if len(rejects.listed) in counts else None


def say(message: str, console: Console) -> None:
    """Print a message so that it is seen."""
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def skippable() -> Iterator[None]:
    """Word an unusable row for the commands that leave such rows out with --skip-broken."""
    try:
        yield
    except RowError as error:
        place = f"{error.place.file}, {error.place.unit} {error.place.row}"
        raise DataError(
            f"{place}: {error.detail}. Repair or remove it, or leave such rows out with --skip-broken."
        ) from error
