"""`diffalign filter` on the embedded pairs: choose, choose again for free, and say what is wrong."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.cli import main
from diffalign.data import open_pairs
from diffalign.filtering.importance import normalised
from diffalign.jobs.scoring import filter as job

ROOT = Path(__file__).parents[2]
PAIRS = str(ROOT / "assets" / "tiny-pairs")
TOWER = str(ROOT / "assets" / "tiny-pickscore")
LIMIT = 200


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs `diffalign filter` and returns what it prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffalign", "filter", PAIRS, "--limit", str(LIMIT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, capsys.readouterr().err
        return " ".join(capsys.readouterr().out.split())

    return call


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Return a function that runs `diffalign filter`, requires exit code 2 and returns the message."""

    def call(*arguments, out=None, data=PAIRS):
        words = ["filter", data, "--limit", str(LIMIT), "--out", out or tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["diffalign", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured
        assert "Traceback" not in captured.err
        return " ".join(captured.err.split())

    return call


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Return a folder in which FiFA has chosen from the first pairs, with scores of the oracle."""
    out = tmp_path_factory.mktemp("filter") / "fifa"
    arguments = ["filter", PAIRS, "--out", str(out), "--limit", str(LIMIT), "--scorer", "oracle"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["diffalign", *arguments, "--text-encoder", TOWER])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return out


@pytest.fixture
def again(chosen, tmp_path):
    """Return a copy of that folder."""
    folder = tmp_path / "again"
    folder.mkdir()
    for file in chosen.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def ids(folder, name="train.parquet"):
    return [row.example_id for row in open_pairs(folder / name)]


def test_the_chosen_pairs_are_those_of_highest_importance(chosen):
    table = pd.read_parquet(chosen / "components.parquet")
    margin = (table.score_chosen - table.score_rejected).to_numpy()
    per_prompt = table.drop_duplicates("prompt_key").set_index("prompt_key")["distance_1"]
    spread = pd.Series(normalised(np.log(per_prompt.to_numpy() + 1e-6), "zscore"), per_prompt.index)
    value = normalised(margin, "zscore") + 0.25 * spread[table.prompt_key].to_numpy()
    best = np.argsort(-value, kind="stable")[: LIMIT // 10]
    selection = pd.read_parquet(chosen / "selection.parquet")
    assert selection.example_id.tolist() == table.example_id.iloc[best].tolist()
    assert np.allclose(selection.value, value[best])
    assert sorted(ids(chosen)) == sorted(selection.example_id)
    assert pq.read_schema(chosen / "train.parquet").equals(pq.read_schema(Path(PAIRS) / "train.parquet"))


def test_the_folder_can_be_trained_on_as_it_is(chosen):
    assert len(open_pairs(chosen)) == LIMIT // 10


def test_the_report_shows_what_happened(chosen):
    page = (chosen / "report.html").read_text()
    assert "20 pairs kept by fifa" in page
    assert page.count("<svg") == 4
    assert page.count("data:image/jpeg") == 2 * 24
    assert "Left out: the lowest values" in page
    assert "http" not in page.replace("data:", "")
    assert 'role="alert"' not in page
    places = [page.index(f'id="{name}"') for name in ("verdict", "moved", "examples-1", "made")]
    assert places == sorted(places)
    named = set(re.findall(r'class="([\w ]+)"', page))
    style = page[: page.index("</style>")]
    assert not {name for names in named for name in names.split() if f".{name}" not in style} - {"undecided"}


def test_labels_that_get_worse_are_told_on_console_and_page(again, run):
    components = job.Components.read(again / "components.parquet")
    components.table.loc[::3, "score_chosen"] -= 9  # the clearest margins are against the label
    components.write(again / "components.parquet")
    said = run("--out", again, "--margin", "absolute")
    assert "Warning: The scorer agrees with 0.0% of the labels kept, less than with all" in said
    assert "use --margin signed, the default" in said
    page = (again / "report.html").read_text()
    assert 'role="alert">The scorer agrees with 0.0% of the labels kept' in page
    assert "less often than all pairs" in page
    assert "Warning" not in run("--out", again)


def test_choosing_again_computes_nothing(again, run, monkeypatch):
    before = (again / "components.parquet").read_bytes()
    for name in ("_score", "_rate", "_measure"):
        monkeypatch.setattr(job, name, None)
    monkeypatch.setattr(job.Components, "of", None)
    first = ids(again)
    for arguments in (["--keep", "7"], ["--method", "diverse"], ["--neighbours", "3", "--alpha", "2"]):
        run("--out", again, *arguments)
    assert ids(again) != first
    said = run("--out", again, "--scorer", "oracle", "--text-encoder", TOWER)
    assert "scores: as saved" in said
    assert "text entropy: as saved" in said
    assert ids(again) == first
    assert (again / "components.parquet").read_bytes() == before


def test_what_changed_is_computed_anew(again, run):
    before = pd.read_parquet(again / "components.parquet")
    run("--out", again, "--scorer", f"pickscore={TOWER}")
    after = pd.read_parquet(again / "components.parquet")
    assert not np.allclose(after.score_chosen, before.score_chosen)
    assert after.distance_1.equals(before.distance_1)
    assert len(pd.read_parquet(again / "selection.parquet")) == LIMIT // 10


def test_scores_of_a_file_and_ratings_of_a_file(tmp_path, run, chosen):
    table = pd.read_parquet(chosen / "components.parquet")
    scores = pd.concat([table.assign(scorer=name)[:150] for name in ("oracle", "other")])
    scores.to_parquet(tmp_path / "scores.parquet")
    prompts = table.prompt.drop_duplicates()
    ratings = pd.DataFrame({"prompt": prompts, "score": 8.0, "harmful": False})
    ratings.loc[ratings.prompt.str.contains("red"), "harmful"] = True
    ratings.loc[ratings.prompt.str.contains("star"), "score"] = 2.0
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    arguments = ["--scores", tmp_path / "scores.parquet", "--scorer", "other", "--gamma", 0, "--keep", "1.0"]
    arguments += ["--text-quality", tmp_path / "ratings.csv", "--min-text-quality", 3]
    said = run("--out", tmp_path / "out", *arguments)
    assert "50 pairs have no score" in said
    kept = {row.prompt for row in open_pairs(tmp_path / "out")}
    assert kept
    assert not [prompt for prompt in kept if "red" in prompt or "star" in prompt]
    expected = table[:150][~table.prompt[:150].str.contains("red|star")]
    assert set(ids(tmp_path / "out")) == set(expected.example_id)
    run("--out", tmp_path / "out", "--method", "random", "--validation", "0.3")
    assert not [row.prompt for row in open_pairs(tmp_path / "out", split="validation") if "red" in row.prompt]


def test_contradicted_labels_can_be_left_out(again, run):
    table = pd.read_parquet(again / "components.parquet")
    run("--out", again, "--keep", "1.0", "--require-agreement")
    assert set(ids(again)) == set(table.example_id[table.score_chosen >= table.score_rejected])


def test_a_validation_split_shares_no_prompt_and_goes_when_unasked(tmp_path, run):
    out = tmp_path / "out"
    run("--out", out, "--method", "random", "--keep", "1.0", "--validation", "0.2")
    sides = [{row.prompt for row in open_pairs(out, split=split)} for split in ("train", "validation")]
    assert sides[0].isdisjoint(sides[1])
    assert len(ids(out)) + len(ids(out, "validation.parquet")) == LIMIT
    assert 0 < len(ids(out, "validation.parquet")) < LIMIT / 2
    run("--out", out, "--method", "random", "--keep", "1.0")
    assert not (out / "validation.parquet").exists()
    assert len(ids(out)) == LIMIT


def test_repeated_pairs_are_kept_once(tmp_path, run, monkeypatch):
    doubled = tmp_path / "pairs.parquet"
    pq.write_table(pq.read_table(Path(PAIRS) / "train.parquet").take([*range(20), *range(5)]), doubled)
    monkeypatch.setattr(sys.modules[__name__], "PAIRS", str(doubled))
    pq.write_table(pq.read_table(doubled).slice(0, 20), tmp_path / "once.parquet")
    usable, all_of_them = len(open_pairs(tmp_path / "once.parquet")), len(open_pairs(doubled))
    assert usable < all_of_them
    assert f"{usable} kept" in run("--out", tmp_path / "a", "--method", "random", "--keep", "1.0")
    assert f"{all_of_them} kept" in run("--out", tmp_path / "b", "--method", "random", "--keep", "1.0", "--no-dedupe")


def test_every_method_chooses_from_the_same_components(again, run):
    found = {}
    for method in ("fifa", "margin", "quality-aware", "diverse", "random"):
        run("--out", again, "--method", method, "--keep", "15")
        found[method] = frozenset(ids(again))
        assert len(found[method]) == 15
    assert found["diverse"] == found["margin"]  # no two of these pairs share a prompt
    assert len(set(found.values())) == 4


def test_score_files_of_the_score_command_fit(tmp_path, run, chosen):
    run("--out", tmp_path / "out", "--scores", chosen / job.SCORES, "--method", "margin")
    assert len(ids(tmp_path / "out")) == LIMIT // 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "fifo"], 'Unknown method "fifo". Did you mean "fifa"?'),
        (["--keep", "120%"], '--keep must be a share such as 0.1 or a number of pairs such as 5000, got "120%"'),
        ([], "The method fifa needs scores of the pairs. Give --scores FILE"),
        (["--scorer", "oracle"], "Give --text-encoder PATH_OR_ID"),
        (["--scorer", "pikscore"], 'Unknown scorer "pikscore". Did you mean "pickscore"?'),
        (["--scores", "none.parquet"], "There is no file none.parquet"),
        (["--text-quality", "none.csv"], "There is no file none.csv"),
        (["--text-quality", "a.csv", "--text-quality-model", "b"], "not both"),
        (["--method", "random", "--min-text-quality", "5"], "--min-text-quality needs ratings"),
        (["--method", "random", "--require-agreement"], "--require-agreement needs scores"),
        (["--method", "random", "--validation", "1"], "--validation must be a share"),
        (["--method", "random", "--text-encoder", "nowhere/at/all"], "Cannot load the text encoder"),
        (["--normalise", "rank"], 'Unknown normalise "rank"'),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_mistakes_end_with_a_fix(fails, arguments, message):
    assert message in fails(*arguments)


def test_scores_of_other_data_are_noticed(fails, tmp_path):
    other = pd.DataFrame({"example_id": [1, 2], "score_chosen": [1.0, 2.0], "score_rejected": [0.0, 0.0]})
    other.to_parquet(tmp_path / "scores.parquet")
    assert "they belong to other data" in fails("--scores", tmp_path / "scores.parquet")


def test_more_neighbours_than_saved_are_asked_for(again, fails):
    assert "neighbour 9. Give --text-encoder" in fails("--neighbours", "9", out=again)


def test_data_without_pairs_is_refused(fails, tmp_path):
    table = pq.read_table(Path(PAIRS) / "train.parquet").slice(0, 4).select(["jpg_0", "label_0", "caption"])
    table = table.set_column(1, "label_0", pa.array([1.0, 0.0, 1.0, 0.0]))
    pq.write_table(table.rename_columns(["image", "label", "caption"]), tmp_path / "singles.parquet")
    assert "Only pairs can be filtered" in fails("--method", "random", data=tmp_path / "singles.parquet")


def test_missing_data_is_named(fails):
    assert "There is no file or folder" in fails("--method", "random", data="nowhere")
