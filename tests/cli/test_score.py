"""`diffalign score` on the command line: what it prints and writes, and how mistakes end."""

import json

import pandas as pd
import pytest

from tests.jobs.material import PROMPTS, png, write_pairs


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(60 * i, i))
    (folder / "3.png").write_bytes(b"no picture")
    return folder


def test_broken_pictures_do_not_stop_a_run_unless_asked(diffalign, pictures, scorer_folders):
    out, judge = pictures.parent / "scores.csv", f"pickscore={scorer_folders['pickscore']}"
    arguments = ["score", pictures, "--prompt", PROMPTS[0], "--with", judge, "--out", out]
    code, told = diffalign(*arguments)
    assert code == 0
    assert "1 of 4 pictures cannot be scored" in told
    table = pd.read_csv(out)
    columns = "file prompt_id prompt seed model image scorer weights preprocessing score".split()
    assert list(table.columns) == columns
    assert len(table) == 3
    assert json.loads((pictures.parent / "scores.broken.jsonl").read_text())["reason"] == "it is not a picture"
    assert diffalign(*arguments, "--skip-broken")[0] == 0
    code, error = diffalign(*arguments, "--strict")
    assert code == 2
    assert "3.png: it is not a picture" in error


def test_pairs_print_accuracy_and_calibration(diffalign, tmp_path, scorer_folders):
    rows = [(png(40 * i, i), png(250 - 40 * i, 9 + i), 1.0, PROMPTS[i % 2]) for i in range(4)]
    pairs = write_pairs(tmp_path / "pairs.parquet", rows)
    judge = f"pickscore={scorer_folders['pickscore']}"
    arguments = ["score", "--pairs", pairs, "--with", judge, "--out", tmp_path / "s.parquet", "--tie-rule", "wrong"]
    code, told = diffalign(*arguments)
    assert code == 0
    assert "Ties: wrong" in told
    assert "Calibration" in told
    assert pd.read_csv(tmp_path / "s.accuracy.csv").loc[0, "tie_rule"] == "wrong"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--pairs", "y"], "got both"),
        ([], "got neither"),
        (["x", "--strict", "--skip-broken"], "give one of them"),
        (["x", "--tie-rule", "wrong"], "belong to --pairs"),
        (["--pairs", "y", "--tie-rule", "halve"], 'Did you mean "half"'),
        (["x", "--batch-size", "many"], "--batch-size"),
        (["x", "--batch-size", "0"], "--batch-size"),
        (["x", "--limit", "3"], "belong to --pairs"),
    ],
)
def test_mistakes_end_with_a_fix(diffalign, arguments, message):
    code, error = diffalign("score", *arguments, "--with", "oracle")
    assert code == 2
    assert message in error
