"""`--protocol` and `arena`: benchmarks of their own rules on real pictures, recomputed; rankings from few votes."""

import json

import pandas as pd
import pytest

from diffalign.evaluation import Manifest
from diffalign.evaluation.scoring import open_image
from diffalign.shapes import benchmarks
from diffalign.shapes.captions import parse
from diffalign.shapes.oracle import measure
from tests.jobs.drawing.test_grid_columns import PROMPTS, draw_folder

MODELS = ("right", "wrong")


class Yes:
    """Answer everything with yes."""

    def answer(self, image, questions):
        return [True] * len(questions)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of rendered pictures of two models: one shows what is asked for, one something else."""
    root = tmp_path_factory.mktemp("drawn")
    shifted = PROMPTS[1:] + PROMPTS[:1]
    return {name: draw_folder(root / name, texts) for name, texts in zip(MODELS, (PROMPTS, shifted), strict=True)}


@pytest.fixture
def run(diffalign, folders, tmp_path):
    def run(*more, out=tmp_path / "out"):
        (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
        words = ("--prompts", tmp_path / "p.txt", "--noise", "shared", "--out", out, "--resamples", "50")
        return diffalign("evaluate", *folders.values(), *words, *more)

    return run


def test_geneval_by_the_oracle(run, tmp_path):
    code, said = run("--protocol", "geneval", "--with", "oracle")
    assert code == 0, said
    assert "4 prompts instead of 553" in said
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["geneval"]["models"]
    assert found["right"]["overall"] == 1.0
    assert found["wrong"]["overall"] == 0.0
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    own = scores[scores["scorer"] == "geneval"].groupby("model")["score"].mean()
    assert own.to_dict() == {"right": 1.0, "wrong": 0.0}
    verdicts = pd.read_csv(tmp_path / "out" / "geneval.csv")
    assert len(verdicts) == 8
    assert verdicts[verdicts["model"] == "wrong"]["reason"].str.startswith("expected").all()
    assert "What papers report" not in said  # an oracle's verdicts: beside papers in the report alone, under a warning
    assert "Not comparable with the published numbers: judged by the" in (tmp_path / "out" / "report.html").read_text()
    reported = json.loads((tmp_path / "out" / "summary.json").read_text())["published"]
    assert {row["source"] for row in reported} == {"RankDPO (2410.18013)"}


def test_dpg_is_what_the_answers_make_it(run, folders, tmp_path):
    assert run("--protocol", "dpg")[0] == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["dpg"]["models"]
    for name, folder in folders.items():
        means = []
        for path, caption in zip(Manifest.read(folder).paths, PROMPTS, strict=True):
            shown = measure(open_image(path), parse(caption))
            asked = [question["text"].split()[5] for question in benchmarks.dpg_questions(caption)]
            yes = {attribute: shown[attribute] >= benchmarks.YES for attribute in asked}
            if not yes["shape"]:  # all but the background hang on it
                yes = {attribute: value and attribute == "background" for attribute, value in yes.items()}
            means.append(sum(yes.values()) / len(yes))
        assert found[name]["overall"] == pytest.approx(100 * sum(means) / len(means))
    assert found["right"]["overall"] > found["wrong"]["overall"]


def test_a_judge_of_ones_own(run, tmp_path):
    assert run("--protocol", "dpg", "--judge", f"{__name__}:Yes")[0] == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["dpg"]["models"]
    assert found["wrong"]["overall"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--protocol", "genevall"), 'Did you mean "geneval"'),
        (("--protocol", "hps", "--with", "oracle"), "name hpsv2 or hpsv2.1 with --with"),
        (("--protocol", "hps", "--with", "hpsv2"), "4 styles of 800 prompts"),
        (("--protocol", "dpg", "--judge", "nowhere:Model"), 'no judge "nowhere:Model"'),
        (("--protocol", "dpg", "--judge", "detector"), "MODULE:NAME"),
        (("--protocol", "geneval", "--judge", f"{__name__}:Yes"), "has no detect()"),
        ((), "scorer"),
    ],
)
def test_mistakes(run, tmp_path, words, message):
    code, said = run(*words, out=tmp_path / "never")
    assert code == 2
    assert message in said
    assert not (tmp_path / "never").exists()


def test_prompts_that_do_not_say_what_is_asked(diffalign, folders, tmp_path):
    (tmp_path / "p.txt").write_text("a cat in the rain")
    words = ("--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", "--protocol", "geneval")
    code, said = diffalign("evaluate", *folders.values(), *words)
    assert code == 2
    assert "geneval=evaluation_metadata.jsonl" in said


def test_an_arena_of_a_score_table(diffalign, tmp_path):
    rows = [
        {"prompt_id": p, "seed": 0, "model": f"m{m}", "scorer": "oracle", "score": m + ((7 * p + 3 * m) % 5) / 4}
        for p in range(12)
        for m in range(6)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "scores.parquet")
    code, said = diffalign("arena", tmp_path / "scores.parquet", "--k", "3", "--votes", "60", "--settled", "0")
    assert code == 0
    places = [said.index(f"m{m} ") for m in range(5, -1, -1)]
    assert places == sorted(places)
    assert "60 votes by oracle" in said
    for words, message in (
        (("--k", "9"), "2 to 6 models, got 9"),
        (("--scorer", "oracel"), 'Did you mean "oracle"'),
        (("--votes", "0"), "at least 1"),
    ):
        code, said = diffalign("arena", tmp_path / "scores.parquet", *words)
        assert code == 2
        assert message in said
