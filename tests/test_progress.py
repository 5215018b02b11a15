"""Long work says how far it has come: in lines without a terminal, in a bar on one."""

import io

import pytest
from rich.console import Console

from diffalign import progress
from diffalign.progress import Progress, clock, progress_bar, waiting


class Clock:
    """Stand still until told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def log():
    return Console(file=io.StringIO())


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_for_every_tenth_or_half_minute_and_one_at_the_end(time):
    console = log()
    with Progress("Drawing", 100, console=console) as shown:
        for _ in range(100):
            time.now += 1
            shown.advance()
    assert lines(console)[0] == "Drawing 10/100  1.00/s  1:30 left"
    assert len(lines(console)) == 10
    assert lines(console)[-1] == "Drawing 100/100  1.00/s  in 1:40"
    slow = log()
    with Progress("Drawing", 1000, console=slow) as shown:
        for _ in range(3):
            time.now += 20
            shown.advance()
    assert lines(slow) == ["Drawing 2/1000  0.05/s  5:32:40 left", "Drawing 3/1000  0.05/s  5:32:20 left"]


def test_quick_work_is_one_line(time):
    console = log()
    with progress_bar(50, "Scoring", console=console) as advance:
        for _ in range(50):
            time.now += 1 / 64
            advance(1)
    assert lines(console) == ["Scoring 50/50  64.00/s  in 0:01"]


def test_nothing_left_to_do_says_nothing():
    console = log()
    with Progress("Drawing", 8, done=8, console=console):
        pass
    assert lines(console) == []


def test_only_notes_are_written_where_notes_count_and_a_rest_starts_where_it_was_left(time):
    console = log()
    with Progress("step", 400, done=10, rate=False, only_notes=True, console=console) as shown:
        for step in range(11, 21):
            time.now += 60
            shown.reach(step, note="loss 0.6543" if step == 20 else None)
    assert lines(console) == ["step 20/400  loss 0.6543  6:20:00 left"]


def test_of_unknown_length(time):
    console = log()
    with Progress("encoding pairs", None, console=console) as shown:
        time.now += 40
        shown.reach(80)
    assert lines(console) == ["encoding pairs 80/?  2.00/s"]


def test_other_processes_are_silent_and_lines_are_not_wrapped(time):
    silent = log()
    with Progress("step", 4, enabled=False, only_notes=True, console=silent) as shown:
        shown.advance(note="loss 1")
    with waiting("hashing", enabled=False, console=silent):
        pass
    assert lines(silent) == []
    narrow = Console(file=io.StringIO(), width=20)
    with Progress("step", 4, only_notes=True, console=narrow) as shown:
        shown.advance(note="loss [bold]0.69 and other things one wants to know")
    (line,) = lines(narrow)
    assert "[bold]0.69 and other things" in line


def test_a_terminal_has_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("step", 4, only_notes=True, console=console) as shown:
        shown.reach(4, note="loss 0.69")
    text = console.file.getvalue()
    assert "━" in text
    assert "4/4" in text
    assert "loss 0.69" in text
    beside = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("part 2 of 2", 4, bar=False, console=beside) as shown:
        shown.advance(4)
    assert "━" not in beside.file.getvalue()
    assert "part 2 of 2 4/4" in beside.file.getvalue()


def test_work_that_failed_does_not_end_as_if_done():
    console = log()

    def work():
        with Progress("Drawing", 8, console=console) as shown:
            shown.advance(3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert lines(console) == []


def test_what_takes_its_time_is_named_before_it_starts():
    console = log()
    with waiting("hashing models and data", console=console):
        assert lines(console) == ["hashing models and data ..."]


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0:00"), (7, "0:07"), (723, "12:03"), (11100, "3:05:00")])
def test_durations(seconds, words):
    assert clock(seconds) == words
