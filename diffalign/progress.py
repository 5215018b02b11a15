"""How far long work has come: a bar on a terminal; in a log file, where a bar would be silent, plain lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich import get_console, progress
from rich.console import Console
from rich.text import Text

EVERY = 30.0  # seconds after which there is a line in any case
SHARE, PAUSE = 0.1, 2.0  # a line for every tenth of the work, if it is not done in a moment


class Progress:
    """Count items of work and show how many are done.

    Args:
        description: what an item is, or what is done with it.
        total: how many items there are; None if nobody knows.
        done: how many of them were finished before, by a run that is continued.
        rate: show items per second.
        bar: False writes lines on a terminal too, where another process has a bar.
        only_notes: without a terminal, write a line for every `note` and no others.
        enabled: False shows nothing, e.g. on all processes but one.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        done: int = 0,
        rate: bool = True,
        bar: bool = True,
        only_notes: bool = False,
        enabled: bool = True,
        console: Console | None = None,
    ):
        self.description, self.total, self.done = description, total, done
        self.rate, self.only_notes = rate, only_notes
        self.console, self.enabled = console or get_console(), enabled
        self._start, self._first, self._note = time.monotonic(), done, ""
        self._written = (self._start, done)  # when the last line was written, and what had been done then
        self._bar = self._task = None
        if enabled and bar and (self.console.is_jupyter or self.console.is_interactive):
            self._bar = progress.Progress(*_columns(rate), console=self.console)
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and not self.only_notes and self.done > self._written[1]:
            self._write()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items as done; a note says how they went."""
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str | None = None) -> None:
        """Say that `done` items are done."""
        self.done, self._note = done, self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._note)
        elif (note is not None) if self.only_notes else self._is_due():
            self._write()

    def _is_due(self) -> bool:
        before, done = self._written
        waited = time.monotonic() - before
        return waited >= EVERY or (bool(self.total) and waited >= PAUSE and self.done - done >= SHARE * self.total)

    def _write(self) -> None:
        """Write one line, such as "encoding pairs 300/2000  12.1/s  2:20 left"."""
        self._written = time.monotonic(), self.done
        if not self.enabled:
            return
        seconds, count = self._written[0] - self._start, self.done - self._first
        parts = [f"{self.description} {self.done}/{'?' if self.total is None else self.total}", self._note]
        parts += [f"{count / seconds:.2f}/s"] if self.rate and count and seconds else []
        if self.total is not None and self.done >= self.total:
            parts.append(f"in {clock(seconds)}")
        elif self.total is not None and count:
            parts.append(f"{clock(seconds / count * (self.total - self.done))} left")
        self.console.print("  ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(
    total: int | None, description: str, enabled: bool = True, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` items; yield the function that counts some more of them."""
    with Progress(description, total, enabled=enabled, console=console) as shown:
        yield shown.advance


@contextmanager
def waiting(description: str, enabled: bool = True, console: Console | None = None) -> Iterator[None]:
    """Show that something takes its time, nobody knows how long."""
    console = console or get_console()
    if not enabled:
        yield
    elif console.is_jupyter or console.is_interactive:
        columns = progress.SpinnerColumn(), progress.TextColumn(description), progress.TimeElapsedColumn()
        with progress.Progress(*columns, transient=True, console=console) as bar:
            bar.add_task("")
            yield
    else:
        console.print(f"{description} ...", markup=False, highlight=False, soft_wrap=True)
        yield


def clock(seconds: float) -> str:
    """Word a duration: 0:07, 12:03, 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f}/s" if speed else "", style="progress.data.speed")


def _columns(rate: bool) -> list[Any]:
    text, note = progress.TextColumn("{task.description}"), progress.TextColumn("{task.fields[note]}")
    counted = [text, progress.BarColumn(), progress.MofNCompleteColumn(), *([_Rate()] if rate else [])]
    times = [progress.TimeElapsedColumn(), progress.TextColumn("<"), progress.TimeRemainingColumn()]
    return [*counted, *times, note]
