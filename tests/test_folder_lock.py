"""A folder has one command at work in it; its name is told, and its end frees the folder."""

import os
import signal
import sys
import time

import pytest

from diffalign.errors import ConfigError
from diffalign.folder_lock import FILE, held


def hold_in_a_fork(folder) -> int:
    """Return a process that holds the folder until it is killed."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        with held(folder):
            os.write(said, b"x")
            time.sleep(60)
    os.read(ready, 1)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_is_told_who_is_there_and_the_folder_is_free_after_kill_9(tmp_path):
    child = hold_in_a_fork(tmp_path / "run")
    try:
        with pytest.raises(ConfigError) as caught, held(tmp_path / "run"):
            pytest.fail("two in one folder")
    finally:
        kill(child)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'run'} is in use by process {child} on {os.uname().nodename} since 20")
    assert f'"{" ".join(sys.argv)}". Wait until that has ended or stop it' in said
    with held(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / FILE).read_text() == ""


def test_a_helper_that_outlives_its_parent_does_not_hold_the_folder(tmp_path):
    with held(tmp_path):
        helper = os.fork()
        if helper == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with held(tmp_path):  # the helper lives
            pass
    finally:
        kill(helper)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot write into .*file.run: .*\. Name another folder\."):
        with held(tmp_path / "file" / "run"):
            pass
