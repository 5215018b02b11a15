"""Votes: blinded, kept, counted, exported to training pairs; a server that is killed with -9 has lost none."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

from diffalign.data import open_pairs
from diffalign.errors import DataError, UserError
from diffalign.evaluation import Manifest
from diffalign.jobs import label as job
from diffalign.jobs import votes as counted
from diffalign.labelling import Votes, agreement_of, cohen_kappa, krippendorff_alpha
from diffalign.labelling.app import PAGE, create_app
from diffalign.labelling.store import pair_tasks

PROMPTS = ("a red circle", "two green stars", "<b>bold</b> & co", "a blue cross")
LEVELS = {"base": 60, "dpo": 200}


def named(specs):
    return job.named_pictures(specs, Path("left_out.jsonl"), Console(quiet=True))


@pytest.fixture
def folders(tmp_path):
    """Return a folder of flat pictures for each of two models, with manifests as generate writes them."""
    found = {}
    for name, level in LEVELS.items():
        noises = [f"of {name} {number}" for number in range(4)]
        requested = pd.DataFrame({"prompt_id": range(4), "prompt": PROMPTS, "seed": 0, "noise": noises})
        manifest = Manifest.plan(tmp_path / name, requested, settings={}, identity=name)
        for number, path in enumerate(manifest.paths):
            Image.new("RGB", (16, 16), (level, 10 * number, 0)).save(path)
        found[name] = tmp_path / name
    return found


@pytest.fixture
def votes(folders, tmp_path):
    with Votes(tmp_path / "votes.sqlite") as opened:
        opened.add(pair_tasks(named([str(folder) for folder in folders.values()])))
        yield opened


def test_the_seeds_of_one_folder_are_judged_against_each_other(tmp_path):
    requested = pd.DataFrame(
        {"prompt_id": [0, 0, 1, 1], "prompt": [*PROMPTS[:1] * 2, *PROMPTS[1:2] * 2], "seed": [5, 7] * 2}
    )
    manifest = Manifest.plan(tmp_path / "drawn", requested, settings={}, identity="one")
    tasks = pair_tasks(named([str(tmp_path / "drawn")]))
    assert [(task.prompt, task.model_a, task.model_b) for task in tasks] == [
        (prompt, "drawn, seed 5", "drawn, seed 7") for prompt in PROMPTS[:2]
    ]
    assert [task.file_a for task in tasks] == [str(path.resolve()) for path in manifest.paths[::2]]


def test_one_picture_of_each_prompt_is_nothing_to_choose_between(folders):
    with pytest.raises(DataError, match=r"base holds one picture of each prompt.*--seeds 0-1"):
        named([str(folders["base"])])


@pytest.fixture
def client(votes):
    return TestClient(create_app(votes), base_url="http://127.0.0.1")


def level(client, number, side, rater):
    answer = client.get(f"/api/image/{number}/{side}", params={"rater": rater})
    assert answer.status_code == 200
    return Image.open(io.BytesIO(answer.content)).getpixel((0, 0))[0]


def choose_brighter(client, rater, count=4):
    """Judge as someone who always takes the picture of "dpo"; return the state after the last vote."""
    state = client.get("/api/next", params={"rater": rater}).json()
    for _ in range(count):
        sides = {side: level(client, state["task"], side, rater) for side in ("left", "right")}
        choice = max(sides, key=sides.get)
        body = {"task": state["task"], "rater": rater, "choice": choice, "seconds": 1.5}
        state = client.post("/api/vote", json=body).json()
    return state


def test_what_is_chosen_is_what_is_kept_whatever_side_it_was_on(client, votes):
    for rater in ("ann", "bob", "cy"):
        assert choose_brighter(client, rater) == {
            "task": None,
            "prompt": None,
            "answer": None,
            "done": 4,
            "total": 4,
        }
    table = votes.table()
    assert len(table) == 12
    assert (table["credit"] == 0).all()  # model_a is base
    assert set(table["left"]) == {"a", "b"}
    assert (table["seconds"] == 1.5).all()


def test_raters_see_other_sides_and_orders_and_the_same_each_time(votes):
    sides = {r: [votes.left_of(task, r) for task in range(1, 5)] for r in map(str, range(40))}
    assert 0.35 < np.mean([side == "a" for row in sides.values() for side in row]) < 0.65
    assert len({tuple(row) for row in sides.values()}) > 5
    assert [votes.left_of(task, "7") for task in range(1, 5)] == sides["7"]
    assert len({votes.next_task(rater) for rater in sides}) > 1


def test_nothing_sent_names_a_model(client):
    state = client.get("/api/next", params={"rater": "ann"})
    image = client.get(f"/api/image/{state.json()['task']}/left", params={"rater": "ann"})
    said = client.get("/").text + state.text + str(dict(image.headers)) + client.get("/api/agreement").text
    assert "dpo" not in said
    assert "base" not in said
    assert set(state.json()) == {"task", "prompt", "answer", "done", "total"}


def test_going_back_shows_the_old_vote_and_keeps_it_unless_changed(client, votes):
    judged = []
    for choice in ("left", "tie", "right"):
        judged.append(client.get("/api/next", params={"rater": "ann"}).json()["task"])
        client.post("/api/vote", json={"task": judged[-1], "rater": "ann", "choice": choice})
    new = client.get("/api/next", params={"rater": "ann"}).json()
    assert new["answer"] is None
    before, task = votes.table(), new["task"]
    for expected, choice in zip(reversed(judged), ("right", "tie", "left"), strict=True):
        state = client.get("/api/back", params={"rater": "ann", "task": task}).json()
        assert (state["task"], state["answer"], state["done"]) == (expected, choice, 3)
        task = state["task"]
    first = client.get("/api/back", params={"rater": "ann", "task": task}).json()
    assert (first["task"], first["answer"]) == (judged[0], "left")  # there is nothing before it
    assert votes.table().equals(before)
    after = client.post("/api/vote", json={"task": judged[0], "rater": "ann", "choice": "tie"}).json()
    assert (after["task"], after["done"]) == (new["task"], 3)
    assert votes.answer_of(judged[0], "ann") == "tie"
    assert votes.table()["task"].tolist() == judged  # a changed vote keeps its place
    assert client.get("/api/back", params={"rater": "bob"}).json()["answer"] is None


def test_kinds_that_browsers_do_not_show_are_sent_as_png(client, votes, folders):
    task = votes.task(1)
    for file in (task.file_a, task.file_b):
        Image.open(file).save(Path(file).with_suffix(".tif"))
    with Votes(votes.file.with_name("tif.sqlite")) as others:
        tif = [str(Path(file).with_suffix(".tif")) for file in (task.file_a, task.file_b)]
        others.add([replace(task, file_a=tif[0], file_b=tif[1])])
        answer = TestClient(create_app(others), base_url="http://127.0.0.1").get("/api/image/1/left?rater=ann")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(answer.content)).size == (16, 16)


def test_only_pictures_are_served_and_exported(client, votes, tmp_path):
    votes.vote(1, "ann", "left")
    for file in (votes.task(1).file_a, votes.task(1).file_b):
        Path(file).write_text("root:x:0:0")  # whatever its name says
    answer = client.get("/api/image/1/left", params={"rater": "ann"})
    assert (answer.status_code, answer.json()["detail"]) == (404, "The picture of task 1 cannot be shown.")
    assert "root" not in answer.text
    with pytest.raises(DataError, match=r"it is not a picture\)\. Put the pictures back"):
        counted.export(votes.file, tmp_path / "out.parquet", "majority", Console(quiet=True))


def test_a_picture_is_served_as_what_it_is(client, votes):
    file = votes.file_of(1, "ann", "left")
    Image.open(file).save(file, "WEBP")  # it is still called .png
    answer = client.get("/api/image/1/left", params={"rater": "ann"})
    assert answer.headers["content-type"] == "image/webp"


def test_tasks_with_few_votes_come_first(client, votes):
    choose_brighter(client, "ann", count=3)
    judged = set(votes.table()["task"])
    assert votes.next_task("bob") not in judged


def test_what_the_server_refuses(client):
    body = {"task": 1, "rater": "ann", "choice": "left"}
    assert client.post("/api/vote", json=body | {"choice": "middle"}).status_code == 422
    assert client.post("/api/vote", json=body | {"rater": ""}).status_code == 422
    assert client.post("/api/vote", json=body | {"task": 99}).status_code == 404
    assert client.get("/api/image/99/left", params={"rater": "ann"}).status_code == 404
    plain = {"content": json.dumps(body), "headers": {"content-type": "text/plain"}}
    assert client.post("/api/vote", **plain).status_code in (415, 422)
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/api/next", params={"rater": "ann"}).json()["done"] == 0


def test_folders_that_do_not_go_together(folders, tmp_path):
    with pytest.raises(UserError, match='Two folders are named "x"'):
        named([f"x={folder}" for folder in folders.values()])
    other = pd.DataFrame({"prompt_id": range(4), "prompt": "others", "seed": 0})
    Manifest.plan(tmp_path / "other", other, settings={}, identity="other")
    with pytest.raises(DataError, match="other prompts or seeds"):
        named([str(folders["base"]), str(tmp_path / "other")])
    (tmp_path / "text.sqlite").write_text("no database at all, but long enough to be one" * 9)
    with pytest.raises(DataError, match="no file of votes"):
        Votes(tmp_path / "text.sqlite")


def test_export_is_read_by_training(votes, tmp_path):
    # Task by task: all for b; two of three for a; a draw; nobody.
    for task, credits in {1: (0, 0, 0), 2: (1, 1, 0), 3: (1, 0)}.items():
        for rater, credit in zip("xyz", credits, strict=False):
            left = votes.left_of(task, rater)
            votes.vote(task, rater, "left" if (left == "a") == bool(credit) else "right")
    console = Console(quiet=True)
    assert counted.export(votes.file, tmp_path / "majority" / "train.parquet", "majority", console) == 3
    source = open_pairs(tmp_path / "majority")
    assert [row.prompt for row in source] == [PROMPTS[0], PROMPTS[1]]  # the draw is a tie
    assert source[0].chosen.load().getpixel((0, 0))[0] == LEVELS["dpo"]
    assert source[1].chosen.load().getpixel((0, 0))[0] == LEVELS["base"]
    assert source[1].extra["n_votes"] == 3
    assert [row.noises for row in source] == [("of dpo 0", "of base 0"), ("of base 1", "of dpo 1")]
    counted.export(votes.file, tmp_path / "share" / "train.parquet", "share", console)
    assert open_pairs(tmp_path / "share")[1].preference == pytest.approx(2 / 3)
    assert counted.export(votes.file, tmp_path / "votes" / "train.parquet", "votes", console) == 8
    assert len(open_pairs(tmp_path / "votes")) == 8
    found = counted.results(votes.file, console)
    assert found["pairs"][0]["win_rate"] == pytest.approx((0 + 2 / 3 + 1 / 2) / 3)
    assert (found["pairs"][0]["wins"], found["pairs"][0]["losses"]) == (3, 5)
    assert (found["pairs"][0]["prompts_won"], found["pairs"][0]["p_value"]) == (1, 1.0)  # one won, one lost, one even
    assert found["ranking"][0]["model"] == "dpo"
    assert found["agreement"]["share_equal"] == pytest.approx((3 + 1 + 0) / 7)


def test_krippendorff_on_the_example_of_its_author():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", C: four observers, twelve units.
    n = None
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ]
    units = list(zip(*observers, strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)
    assert np.isnan(krippendorff_alpha([[1, n], [2, n]]))
    assert krippendorff_alpha([[0, 1], [1, 0]]) < 0


def test_cohen_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: agreed 0.7, chance 0.5.
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert np.isnan(cohen_kappa(["x", "x"], ["x", "x"]))


def test_agreement_counts_shared_tasks_only():
    rows = [(1, "x", 1.0), (1, "y", 1.0), (2, "x", 0.0), (2, "y", 1.0), (3, "x", 0.5)]
    found = agreement_of(pd.DataFrame(rows, columns=["task", "rater", "credit"]))
    assert (found["raters"], found["votes"], found["shared_tasks"], found["share_equal"]) == (2, 5, 2, 0.5)
    assert found["kappa"] == [{"raters": ["x", "y"], "kappa": 0.0, "tasks": 2}]


def start(*arguments):
    """Start `diffalign label` and return the process and the address it told."""
    command = [sys.executable, "-m", "diffalign", "label", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    for line in process.stdout:
        if "http://127.0.0.1:" in line:
            return process, next(word for word in line.split() if word.startswith("http://"))
    raise AssertionError(f"It ended with {process.wait()} before it told its address.")


def ask(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_votes_survive_kill_minus_nine(folders, tmp_path):
    file = tmp_path / "votes.sqlite"
    process, address = start(*folders.values(), "--votes", file)
    try:
        for done in (1, 2):
            task = ask(f"{address}api/next?rater=ann")["task"]
            assert ask(f"{address}api/vote", {"task": task, "rater": "ann", "choice": "tie"})["done"] == done
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Votes(file) as votes:
        assert votes.progress("ann") == (2, 4)
    process, address = start("--votes", file)
    try:
        state = ask(f"{address}api/next?rater=ann")
        assert (state["done"], state["total"]) == (2, 4)
        assert ask(f"{address}api/vote", {"task": state["task"], "rater": "ann", "choice": "left"})["done"] == 3
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_of_the_page_parses(tmp_path):
    script = PAGE.read_text(encoding="utf8").split("<script>")[1].split("</script>")[0]
    (tmp_path / "page.js").write_text(script)
    assert subprocess.run(["node", "--check", tmp_path / "page.js"], check=False).returncode == 0
