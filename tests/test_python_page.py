"""docs/python.md runs from top to bottom, as in a notebook, and prints what it shows, but for the numbers."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python.md"
CELL = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d.:]*(e[-+]?\d+)?")


def cells() -> list[tuple[str, str]]:
    """Return code and output of every cell."""
    return CELL.findall(PAGE.read_text(encoding="utf8"))


def shape(output: str) -> str:
    """Return an output without its numbers, its spaces, the lengths of its bars and where this checkout lies."""
    here = output.replace(f"{ROOT}/", "")
    return " ".join(re.sub("[━╺╸]+", "━", NUMBER.sub("#", here)).split())


def test_every_block_has_its_output():
    assert len(cells()) == PAGE.read_text(encoding="utf8").count("```python") > 8


def test_numbers_are_all_that_may_differ():
    assert shape("loss 0.69, -1.2e-05 [2] 0:00:01  ━━╸") == shape("loss 12, +3 [4] 0:01:01 ━")
    assert shape("loss 0.69") != shape("margin 0.69")
    assert shape(f"Data: {ROOT}/assets") == shape("Data: assets")
    assert shape("runs/beta-500") != shape("runs/beta-5000")


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # no path is broken
    names = {"__name__": "__main__"}
    for code, shown in cells():
        exec(compile(code, str(PAGE), "exec"), names)
        assert shape(capsys.readouterr().out) == shape(shown), code
