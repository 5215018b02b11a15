"""Folders of one's own pictures, compared and labelled without a manifest; and pairs of any source, labelled."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from diffalign.errors import DataError, UserError
from diffalign.jobs import label as job
from diffalign.jobs import skipped
from diffalign.jobs.scoring.own_pairs import tasks_of
from diffalign.jobs.scoring.own_pictures import Folder, open_folders
from tests.jobs.material import PROMPTS, png, write_pairs


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=500)


@pytest.fixture
def folders(tmp_path):
    """Return a function that writes folders of pictures: name -> their names."""

    def write(**files):
        for level, (folder, names) in enumerate(files.items()):
            (tmp_path / folder).mkdir()
            for seed, name in enumerate(names):
                (tmp_path / folder / name).write_bytes(png(60 + 120 * level, seed))
        return [Folder.of(str(tmp_path / folder)) for folder in files]

    return write


def opened(folders, tmp_path, console):
    return open_folders(folders, tmp_path / skipped.FILE, console)


def test_equal_names_show_the_same_prompt_whatever_their_kind(folders, tmp_path, console):
    pair = folders(a=["2.png", "10.png", "x_cat.png"], b=["10.jpg", "2.webp", "x_cat.png"])
    (tmp_path / "a" / "2.txt").write_text("a red circle\n")
    (tmp_path / "b" / "captions.json").write_text(json.dumps({"10": "a red circle"}))
    found = opened(pair, tmp_path, console)
    table = found["a"].table
    assert table["file"].tolist() == ["2.png", "10.png", "x_cat.png"]
    assert found["b"].table["file"].tolist() == ["2.webp", "10.jpg", "x_cat.png"]
    assert table["prompt"].tolist() == ["a red circle", "a red circle", "x cat"]
    assert table[["prompt_id", "seed"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert '1 of 3 prompts are file names, such as "x_cat"' in console.file.getvalue()
    found["a"].require_comparable(found["b"])
    assert not (tmp_path / skipped.FILE).exists()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_an_image_folder(folders, tmp_path, console, name):
    pair = folders(a=["0.png", "1.png"], b=["0.png", "1.png"])
    rows = pd.DataFrame({"file_name": ["1.png", "0.png"], "text": ["one", "zero"]})
    file = tmp_path / "b" / name
    rows.to_csv(file, index=False) if name.endswith("csv") else rows.to_json(file, orient="records", lines=True)
    assert opened(pair, tmp_path, console)["a"].prompts == ["zero", "one"]
    assert console.file.getvalue() == ""


def test_what_cannot_be_compared_is_left_out_and_listed(folders, tmp_path, console):
    pair = folders(a=["0.png", "1.png", "2.png", "3.png", "4.png"], b=["0.png", "1.png", "2.png", "3.png", "3.jpg"])
    (tmp_path / "b" / "1.png").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes(png(1, 1))
    (tmp_path / "b" / "2.png").unlink()
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "secret.png")
    assert opened(pair, tmp_path, console)["b"].table["file"].tolist() == ["0.png"]
    assert "Left out 4 of 5 names of pictures as unusable" in console.file.getvalue()
    listed = [json.loads(line) for line in (tmp_path / skipped.FILE).read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in listed} == {
        "1": "broken image",
        "2": "outside the folder",
        "3": "several of one name",
        "4": "no partner",
    }


def test_folders_that_do_not_go_together(folders, tmp_path, console):
    a, b, c = folders(a=["0.png"], b=["1.png"], c=["0.png"])
    with pytest.raises(DataError, match="no picture of equal name"):
        opened([a, b], tmp_path, console)
    with pytest.raises(UserError, match="two or more folders"):
        opened([a], tmp_path, console)
    (tmp_path / "a" / "0.txt").write_text("a cat")
    (tmp_path / "c" / "0.txt").write_text("a dog")
    with pytest.raises(DataError, match=r"'a cat' in .*a but 'a dog' in .*c\. Make them agree"):
        opened([a, c], tmp_path, console)
    (tmp_path / "empty").mkdir()
    assert Folder.of(str(tmp_path / "empty")) is None
    (tmp_path / "b" / "model_index.json").write_text("{}")
    assert Folder.of(str(tmp_path / "b")) is None  # a model, with a picture of what it draws
    assert Folder.of(f"mine={tmp_path / 'a'}").name == "mine"


def test_evaluate_compares_them(diffalign, folders, tmp_path, scorer_folders):
    folders(a=["x.png", "y.png"], b=["x.png", "y.png"])
    for name, prompt in zip("xy", PROMPTS, strict=False):
        (tmp_path / "a" / f"{name}.txt").write_text(prompt)
    judge = f"pickscore={scorer_folders['pickscore']}"
    command = ["evaluate", tmp_path / "a", f"mine={tmp_path / 'b'}", "--with", judge, "--out", tmp_path / "out"]
    code, told = diffalign(*command)
    assert code == 0, told
    assert "mine scored higher than a on" in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_prompts"] == 2
    assert summary["models"]["mine"]["scorers"]["pickscore"]["sentence"] in told
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert sorted(scores["prompt"].unique()) == sorted(PROMPTS[:2])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pictures of the same prompt are compared" in page
    assert page.count("data:image/png") == 2 * 2 * 2  # examples and gallery
    assert diffalign(*command, "--limit", 1)[0] == 0
    code, told = diffalign(*command, "--prompts", "embedded")
    assert (code, "leave out --prompts" in told) == (2, True)
    code, told = diffalign("evaluate", tmp_path / "a", "assets/tiny-sdxl", "--with", judge, "--out", tmp_path / "out")
    assert (code, "say with --prompts what it shall draw" in told) == (2, True)


def test_they_become_tasks_for_raters(folders, tmp_path, console):
    folders(a=["x.png"], b=["x.png"], c=["x.png"])
    wanted = job.Wanted(places=[str(tmp_path / name) for name in "abc"])
    tasks = job._tasks(wanted, tmp_path / "votes.sqlite", console)
    assert [(task.model_a, task.model_b, task.prompt) for task in tasks] == [
        ("a", "b", "x"),
        ("a", "c", "x"),
        ("b", "c", "x"),
    ]
    ranked = job._tasks(job.Wanted(places=wanted.places, rank=3), tmp_path / "votes.sqlite", console)
    assert [task.models for task in ranked] == [("a", "b", "c")]
    with pytest.raises(DataError, match="is no folder of pictures"):
        job._tasks(job.Wanted(places=[str(tmp_path / "a"), "nowhere"]), tmp_path / "votes.sqlite", console)
    with pytest.raises(DataError, match="There is no file or folder nowhere"):
        job._tasks(job.Wanted(places=["nowhere"]), tmp_path / "votes.sqlite", console)


def test_pairs_of_any_source_become_tasks_of_copied_pictures(tmp_path, console):
    rows = [(png(60 * i, i), png(250 - 40 * i, 9 + i), 1.0, PROMPTS[i % 2]) for i in range(4)]
    rows.append((b"no picture", png(1, 1), 1.0, PROMPTS[0]))
    data = write_pairs(tmp_path / "pairs.parquet", rows)
    kept = tmp_path / "votes.pictures"
    tasks = tasks_of(str(data), kept, "train", None, console)
    assert [(t.prompt_id, t.seed, t.prompt) for t in tasks] == [
        (0, 0, PROMPTS[0]),
        (1, 0, PROMPTS[1]),
        (0, 1, PROMPTS[0]),
        (1, 1, PROMPTS[1]),
    ]
    assert {(t.model_a, t.model_b) for t in tasks} == {("chosen", "rejected")}
    with Image.open(tasks[0].file_a) as shown, Image.open(io.BytesIO(rows[0][0])) as given:
        assert np.array_equal(np.asarray(shown), np.asarray(given))
    assert "Left out 1 of 5 rows as unusable: 1 broken image." in console.file.getvalue()
    assert (kept / skipped.FILE).is_file()
    assert len(tasks_of(str(data), kept, "train", 2, console)) == 2


def test_pairs_in_folders_become_tasks(tmp_path, console):
    for side, level in (("w", 200), ("l", 50)):
        (tmp_path / "own" / side).mkdir(parents=True)
        (tmp_path / "own" / side / "0.png").write_bytes(png(level, 0))
    (tmp_path / "own" / "w" / "0.txt").write_text("a cat")
    wanted = job.Wanted(places=[str(tmp_path / "own")])
    (task,) = job._tasks(wanted, tmp_path / "votes.sqlite", console)
    assert task.prompt == "a cat"
    assert str(tmp_path / "votes.pictures") in task.file_a
