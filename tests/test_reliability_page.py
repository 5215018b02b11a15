"""Every promise of docs/reliability.md names a test that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf8")
PROMISES = re.findall(r"^\| (.+?) \| (.*`.*) \|$", PAGE.partition("## Checkpoints")[0], flags=re.MULTILINE)


def names_of(file: str) -> list[str]:
    """Return the tests and their classes in the one file of this name."""
    (path,) = [path for path in (ROOT / "tests").rglob("*.py") if str(path.relative_to(ROOT)).endswith(file)]
    return re.findall(r"^ *(?:def|class) (\w+)", path.read_text(encoding="utf8"), flags=re.MULTILINE)


def test_there_are_promises():
    assert len(PROMISES) > 15


@pytest.mark.parametrize(("promise", "tests"), PROMISES)
def test_a_promise_names_tests_that_exist(promise, tests):
    file, found = None, 0
    for said in re.findall(r"`([^`]+)`", tests):
        named, _, name = said.rpartition("::") if "::" in said else (said, "", "")
        if not said.endswith(".py") and "::" not in said:
            named, name = file, said  # another test of the same file
        file = named
        pattern = re.escape(name).replace(r"\.\.\.", r"\w*")
        found += any(re.fullmatch(pattern or r"test_\w+", known) for known in names_of(file))
        assert found, said
    assert found == len(re.findall(r"`([^`]+)`", tests)), tests
