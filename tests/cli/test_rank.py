"""`diffalign rank`: scored pictures become lists and pairs that training reads."""

import io

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffalign.cli import app
from diffalign.data import open_pairs
from diffalign.errors import DataError
from tests.jobs.material import png

PROMPTS = ("a red circle", "two green stars", "a blue cross")


@pytest.fixture
def scores(tmp_path):
    """Return a table of three prompts with four pictures each, judged by two scorers that mostly agree."""
    rows = []
    for p, prompt in enumerate(PROMPTS):
        for i in range(4):
            file = tmp_path / f"{p}-{i}.png"
            file.write_bytes(png(40 + 50 * i, seed=p))
            rows += [
                {"file": str(file), "prompt": prompt, "scorer": "pickscore", "score": 20.0 + i},
                {"file": str(file), "prompt": prompt, "scorer": "hpsv2", "score": 0.2 + (i if i != 2 else -1)},
            ]
    table = tmp_path / "scores.parquet"
    pd.DataFrame(rows).to_parquet(table)
    return table


def invoke(*arguments):
    return CliRunner().invoke(app, ["rank", *map(str, arguments)], catch_exceptions=True)


def level(ref):
    return Image.open(io.BytesIO(ref.content)).convert("L").getextrema()[0]


def test_lists_are_read_back_best_first_with_win_rates(scores, tmp_path):
    assert invoke(scores, "--out", tmp_path / "lists" / "train.parquet").exit_code == 0
    source = open_pairs(tmp_path / "lists")
    assert len(source) == 3
    row = source[0]
    assert row.prompts == (PROMPTS[0],) * 4
    # pickscore: 0 < 1 < 2 < 3; hpsv2: 2 < 0 < 1 < 3
    assert list(row.scores) == pytest.approx([6 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert level(row.images[0]) > level(row.images[1])


def test_pairs_are_best_against_worst(scores, tmp_path):
    out = tmp_path / "pairs.parquet"
    assert invoke(scores, "--out", out, "--as", "pairs").exit_code == 0
    source = open_pairs(out)
    assert [row.prompt for row in source] == list(PROMPTS)
    assert source[0].extra["win_rate_0"] == 1.0
    assert level(source[0].chosen) > level(source[0].rejected)
    assert isinstance(invoke(scores, "--out", out, "--as", "pairs", "--min-gap", "0.9").exception, DataError)


def test_what_pictures_were_drawn_from_goes_along_if_all_is_known(scores, tmp_path):
    table = pd.read_parquet(scores)
    table["noise"] = table["file"].map(lambda file: f"of {file[-7:-4]}")
    table.to_parquet(scores)
    lists, pairs = tmp_path / "lists.parquet", tmp_path / "pairs.parquet"
    assert invoke(scores, "--out", lists).exit_code == 0
    assert open_pairs(lists)[1].noises == ("of 1-3", "of 1-1", "of 1-2", "of 1-0")
    assert invoke(scores, "--out", lists, "--k", 2).exit_code == 0
    assert open_pairs(lists)[1].noises == ("of 1-1", "of 1-0")
    assert invoke(scores, "--out", pairs, "--as", "pairs").exit_code == 0
    assert open_pairs(pairs)[2].noises == ("of 2-3", "of 2-0")
    table.loc[5, "noise"] = None
    table.to_parquet(scores)
    assert invoke(scores, "--out", pairs, "--as", "pairs").exit_code == 0
    assert not open_pairs(pairs).has_noises


def test_lists_of_a_given_length_leave_out_shorter_prompts(scores, tmp_path):
    table = pd.read_parquet(scores)
    table = table[~table["file"].str.contains("1-[23]", regex=True)]
    table.to_parquet(scores)
    out = tmp_path / "lists.parquet"
    told = invoke(scores, "--out", out).exception
    assert "have 2 to 4 pictures" in str(told)
    assert invoke(scores, "--out", out, "--k", 3).exit_code == 0
    source = open_pairs(out)
    assert [len(row.images) for row in source] == [3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="prompt"), 'no column "prompt"'),
        (lambda t: t.iloc[:-1], "lacks the score of one scorer"),
        (lambda t: t.assign(file=t["file"] + "x"), "Cannot read the picture"),
    ],
)
def test_what_cannot_be_ranked_is_named_and_nothing_is_written(scores, tmp_path, change, message):
    change(pd.read_parquet(scores)).to_parquet(scores)
    out = tmp_path / "lists.parquet"
    assert message in str(invoke(scores, "--out", out).exception)
    assert not out.exists()
