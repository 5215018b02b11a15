"""Signals end work where it stands, or when it is saved; never twice, and never where they are to be ignored."""

import importlib
import os
import signal
import sys
import threading

import pytest
import typer

from diffalign.interrupts import Interrupted, at_once, deferred

root = importlib.import_module("diffalign.cli.app")  # the package has the app itself under this name
pytestmark = pytest.mark.usefixtures("listening")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_an_exception_with_the_exit_code_of_shells(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, at_once():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_whoever_catches_ctrl_c_catches_it():
    with pytest.raises(KeyboardInterrupt), at_once():
        signal.raise_signal(signal.SIGTERM)


def work(done, told_at):
    """Do five steps, told to stop during one of them."""
    with deferred() as asked:
        for step in range(5):
            if step == told_at:
                signal.raise_signal(signal.SIGUSR1)
            done.append(step)
            if asked and step < 4:
                raise asked.stop("saved")


def test_work_is_finished_before_it_ends():
    done = []
    with pytest.raises(Interrupted, match="saved") as caught, at_once():
        work(done, told_at=2)
    assert done == [0, 1, 2]
    assert caught.value.name == "SIGUSR1"


def test_a_signal_that_nobody_heeded_ends_what_follows():
    done = []
    with pytest.raises(Interrupted) as caught, at_once():
        done.append(work(done, told_at=4))
    assert done == [0, 1, 2, 3, 4]
    assert caught.value.number == signal.SIGUSR1


def test_what_was_to_be_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with at_once(), deferred() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_beside_the_main_thread_nothing_is_handled():
    seen = []

    def aside():
        with at_once(), deferred() as asked:
            seen.append(bool(asked))

    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_forked_helper_leaves_ctrl_c_to_its_parent_and_dies_of_sigterm():
    with at_once():
        child = os.fork()
        if child == 0:
            ignored = all(signal.getsignal(number) == signal.SIG_IGN for number in NUMBERS if number != signal.SIGTERM)
            os._exit(0 if ignored and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        (["score"], "the same command"),
        (["train"], "the same command with --resume latest"),
        (["reward"], "the same command with --resume"),
    ],
)
def test_the_command_line_says_how_to_go_on(monkeypatch, capsys, words, goes_on):
    commands = typer.Typer(cls=root._Root)
    for name in ("score", "train", "reward"):
        commands.command(name)(lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(root, "app", commands)
    monkeypatch.setattr(sys, "argv", ["diffalign", *words])
    with pytest.raises(SystemExit) as ended:
        root.main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == f"Interrupted: SIGTERM. What was finished is on disk; {goes_on} goes on.\n"
