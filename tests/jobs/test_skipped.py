"""Rows that are left out are told: how many, why, and where they are listed."""

import io
import json

import pandas as pd
from rich.console import Console

from diffalign.data import open_pairs
from diffalign.data.pairs import Place, RowError
from diffalign.data.rejects import Rejects
from diffalign.jobs import skipped
from tests.jobs.material import PROMPTS, png, write_pairs

BROKEN = (b"no picture", png(10, 1), 1.0, PROMPTS[0])


def recorder():
    return Console(file=io.StringIO(), width=400)


def test_the_most_frequent_reasons_come_first(tmp_path):
    reasons = {"missing caption": 2, "broken image": 1200, "no partner": 3, "aspect ratio": 1, "list length": 1}
    assert skipped.told(reasons, 5000, tmp_path / "x.jsonl") == (
        "Left out 1,207 of 5,000 rows as unusable: 1,200 broken image, 3 no partner, 2 missing caption, 2 for other "
        f"reasons. Listed in {tmp_path / 'x.jsonl'}."
    )
    assert skipped.told({"no partner": 1}, 2, None, "pictures").endswith("2 pictures as unusable: 1 no partner.")


def test_a_source_is_told_once_and_again_when_there_is_more(tmp_path):
    rejects, console = Rejects("skip", tmp_path / skipped.FILE), recorder()
    rejects.counts.rows = 100
    skipped.tell(rejects, console)
    assert console.file.getvalue() == ""
    for row in range(2):
        rejects.add(RowError(Place("a.parquet", row), "broken image", "cannot decode it"))
    skipped.tell(rejects, console)
    skipped.tell(rejects, console)
    assert console.file.getvalue().count("Left out 2 of 100 rows as unusable: 2 broken image. Listed in") == 1
    skipped.follow(rejects, console)
    for row in range(2, 12):
        rejects.add(RowError(Place("a.parquet", row), "broken image", "cannot decode it"))
    told = console.file.getvalue()
    assert [f"Left out {n} of" in told for n in (3, 4, 11, 12)] == [True, False, False, True]
    assert len((tmp_path / skipped.FILE).read_text().splitlines()) == 12


def test_filter_score_and_reward_tell_what_they_left_out(diffalign, tmp_path, scorer_folders):
    whole = [(png(60 * i, i), png(250 - 40 * i, 9 + i), 1.0, PROMPTS[i % 2]) for i in range(4)]
    no_caption = (png(3, 3), png(4, 4), 1.0, "")
    data = write_pairs(tmp_path / "pairs.parquet", [*whole, no_caption])
    judge = f"pickscore={scorer_folders['pickscore']}"
    start = ["--init", scorer_folders["pickscore"], "--max-steps", 1, "--dry-run"]
    reward = tmp_path / "r"
    commands = {
        tmp_path / "f" / skipped.FILE: ["filter", data, "--out", tmp_path / "f", "--method", "random", "--skip-broken"],
        tmp_path / f"s.{skipped.FILE}": ["score", "--pairs", data, "--with", judge, "--out", tmp_path / "s.csv"],
        reward / skipped.FILE: ["reward", "train", "pickscore", data, "--out", reward, "--skip-broken", *start],
    }
    for listed, command in commands.items():
        code, told = diffalign(*command)
        assert code == 0, told
        assert f"Left out 1 of 5 rows as unusable: 1 empty caption. Listed in {listed}." in told
        assert json.loads(listed.read_text())["row"] == 4


def test_reward_training_leaves_out_broken_pictures_or_names_the_option(diffalign, tmp_path, scorer_folders):
    whole = [(png(60 * i, i), png(250 - 40 * i, 9 + i), 1.0, PROMPTS[i % 2]) for i in range(4)]
    data = write_pairs(tmp_path / "pairs.parquet", [*whole, BROKEN])
    command = ["reward", "train", "pickscore", data, "--init", scorer_folders["pickscore"], "--out", tmp_path / "r"]
    code, told = diffalign(*command, "--max-steps", 1, "--skip-broken", "--dry-run")
    assert code == 0
    assert "Left out 1 of 5 rows as unusable: 1 broken image." in told
    empty = write_pairs(tmp_path / "none.parquet", [(png(3, 3), png(4, 4), 1.0, ""), *whole])
    code, told = diffalign(*[empty if word is data else word for word in command], "--dry-run")
    assert code == 2
    assert "leave such rows out with --skip-broken" in told


def test_rank_tells_and_lists_the_prompts_it_left_out(diffalign, tmp_path):
    rows = []
    for prompt, scores in {PROMPTS[0]: (1.0, 2.0), PROMPTS[1]: (1.0, 1.0), "alone": (1.0,)}.items():
        for i, score in enumerate(scores):
            file = tmp_path / f"{prompt}-{i}.png"
            file.write_bytes(png(40 + 50 * i, seed=i))
            rows.append({"file": str(file), "prompt": prompt, "scorer": "s", "score": score})
    pd.DataFrame(rows).to_parquet(tmp_path / "scores.parquet")
    code, told = diffalign("rank", tmp_path / "scores.parquet", "--out", tmp_path / "p.parquet", "--as", "pairs")
    assert code == 0
    listed = tmp_path / f"p.{skipped.FILE}"
    assert "Left out 2 of 3 prompts as unusable: 1 whose pictures the scorers do not tell apart, 1 with one" in told
    assert [json.loads(line)["prompt"] for line in listed.read_text().splitlines()] == [PROMPTS[1], "alone"]
    assert len(open_pairs(tmp_path / "p.parquet")) == 1
