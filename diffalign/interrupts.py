"""Signals that ask a command to end: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, as terminals and schedulers send them.

They end a command where it stands, as an exception that lets every `with` put things in order; inside `deferred` they
wait until the work at hand is done and saved. The exit code is 128 and the signal's number: 130, 143, 129, 138.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SAME = 1.0  # seconds: a launcher passes on what its whole group was sent already, which is no second Ctrl-C


class Interrupted(KeyboardInterrupt):
    """Report that a signal ended the work; the message says what is saved and how to go on."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return what a shell knows the signal by."""
        return 128 + self.number

    @property
    def name(self) -> str:
        """Return SIGTERM, or Ctrl-C for SIGINT."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


@dataclass
class Asked:
    """Hold the signal that came, if one has."""

    number: int | None = None
    since: float = 0.0
    heeded: bool = False  # somebody ended the work for it

    def __bool__(self) -> bool:
        return self.number is not None

    def stop(self, said: str) -> Interrupted:
        """Return what to raise when the work is saved; `said` is told to the user."""
        self.heeded = True
        return Interrupted(self.number or signal.SIGTERM, said)  # of several processes another one was asked


@contextmanager
def at_once() -> Iterator[None]:
    """Raise `Interrupted` wherever one of the signals arrives."""

    def end(number: int, _: Any) -> None:
        raise Interrupted(number)

    with _handled(end):
        yield


@contextmanager
def deferred() -> Iterator[Asked]:
    """Yield what says whether a signal has come; the second Ctrl-C raises `Interrupted` at once.

    A signal that nobody heeded until the end of the context is sent again, to whoever handled it before.
    """
    asked = Asked()

    def note(number: int, _: Any) -> None:
        now = time.monotonic()
        if asked and number == signal.SIGINT and now - asked.since > SAME:
            asked.heeded = True
            raise Interrupted(number)
        if not asked:
            asked.number, asked.since = number, now

    with _handled(note):
        yield asked
    if asked and not asked.heeded:
        signal.raise_signal(asked.number)


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the signals in this process; those that it was started to ignore (nohup) stay ignored."""
    before: dict[int, Any] = {}
    try:
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            current = signal.getsignal(number)
            if current not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: whoever is there handles them
        pass
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def leave_to_parent() -> None:
    """In a process that was forked: let the parent decide. A terminal sends Ctrl-C to its helpers too."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and getattr(signal.getsignal(number), "__module__", "") == __name__:
            signal.signal(number, signal.SIG_DFL if name == "SIGTERM" else signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=leave_to_parent)
