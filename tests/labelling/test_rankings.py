"""Rankings of k pictures: kept as said, blinded, proposed by the arena, exported as ranked lists and as pairs."""

import json

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

from diffalign.data import open_pairs, win_rate_labels
from diffalign.errors import DataError, UserError
from diffalign.evaluation import Manifest
from diffalign.jobs import label as job
from diffalign.jobs import votes as counted
from diffalign.labelling import Rankings
from diffalign.labelling.app import create_app
from diffalign.labelling.rankings import as_votes, list_tasks

MODELS = {"base": 50, "dpo": 100, "mapo": 150, "inpo": 200}
QUIET = Console(quiet=True)


@pytest.fixture
def named(tmp_path):
    """Return name and pictures of four models; the brighter a picture, the further down its model stands."""
    for name, level in MODELS.items():
        requested = pd.DataFrame({"prompt_id": range(3), "prompt": ["a", "b", "c"], "seed": 0})
        manifest = Manifest.plan(tmp_path / name, requested, settings={}, identity=name)
        for number, path in enumerate(manifest.paths):
            Image.new("RGB", (16, 16), (level, 10 * number, 0)).save(path)
    return job.named_pictures(
        [str(tmp_path / name) for name in MODELS], tmp_path / "left_out.jsonl", Console(quiet=True)
    )


@pytest.fixture
def rankings(named, tmp_path):
    with Rankings(tmp_path / "votes.sqlite", counted.propose) as opened:
        opened.add(list_tasks(named, 4))
        yield opened


def brightness(rankings, number, rater):
    """Return how bright the picture at each place is."""
    count = len(rankings.task(number).files)
    return [Image.open(rankings.file_of(number, rater, place)).getpixel((0, 0))[0] for place in range(count)]


def rank_by_brightness(rankings, rater, number):
    levels = brightness(rankings, number, rater)
    rankings.rank(number, rater, [1 + sum(other > level for other in levels) for level in levels])


def test_ranks_belong_to_models_wherever_the_pictures_were(rankings):
    for rater in ("ann", "bob", "cy"):
        for number in (1, 2, 3):
            rank_by_brightness(rankings, rater, number)
    table = rankings.table()
    assert len(table) == 9
    assert all(ranks == [4, 3, 2, 1] for ranks in table["ranks"])
    assert len({tuple(rankings.places(1, str(rater))) for rater in range(30)}) > 10
    assert rankings.next_task("ann") is None
    assert rankings.progress("ann") == (3, 3)
    assert rankings.previous("ann", None) == 3
    assert [rankings.previous("ann", number) for number in (3, 2, 1)] == [2, 1, None]


def test_a_ranking_is_shown_again_as_it_was_given(rankings):
    rankings.rank(1, "ann", [2, 4, 1, 3])
    rankings.rank(2, "ann", [1, 1, 3, 4])
    assert rankings.answer_of(1, "ann") == [2, 4, 1, 3]
    assert rankings.answer_of(1, "bob") is None
    rankings.rank(1, "ann", [1, 2, 3, 4])
    assert rankings.answer_of(1, "ann") == [1, 2, 3, 4]
    assert rankings.table()["task"].tolist() == [1, 2]  # a changed answer keeps its place


def test_ties_survive_and_nonsense_does_not(rankings):
    rankings.rank(1, "ann", [1, 1, 3, 4])
    assert sorted(rankings.table()["ranks"][0]) == [1, 1, 3, 4]
    votes = as_votes(rankings.table())
    assert len(votes) == 6
    assert (votes["credit"] == 0.5).sum() == 1
    for ranks in ([1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 5]):
        with pytest.raises(DataError, match="a rank from 1 on"):
            rankings.rank(1, "ann", ranks)
    with pytest.raises(DataError, match="no list 9"):
        rankings.rank(9, "ann", [1, 2, 3, 4])


def test_nothing_the_page_gets_names_a_model(rankings):
    client = TestClient(create_app(rankings), base_url="http://127.0.0.1")
    state = client.get("/api/next", params={"rater": "ann"}).json()
    assert state["pictures"] == 4
    image = client.get(f"/api/image/{state['task']}/0", params={"rater": "ann"})
    assert image.status_code == 200
    after = client.post("/api/rank", json={"task": state["task"], "rater": "ann", "ranks": [1, 2, 2, 4]})
    assert after.json()["done"] == 1
    said = json.dumps([state, after.json(), str(dict(image.headers))])
    assert not [name for name in MODELS if name in said]
    assert client.get(f"/api/image/{state['task']}/4", params={"rater": "ann"}).status_code == 404
    assert client.post("/api/rank", json={"task": 1, "rater": "ann", "ranks": [1]}).status_code == 404


def test_the_next_list_is_the_match_that_tells_most(named, tmp_path):
    with Rankings(tmp_path / "votes.sqlite", counted.propose) as rankings:
        assert rankings.add(list_tasks(named, 3)) == 4 * 3
        played = dict.fromkeys(MODELS, 0)
        for _ in range(5):
            number = rankings.next_task("ann")
            models = rankings.task(number).models
            rarest = {name for name, count in played.items() if count == min(played.values())}
            assert rarest & set(models)  # one seen least is always asked about
            rank_by_brightness(rankings, "ann", number)
            played |= {name: played[name] + 1 for name in models}
    assert min(played.values()) >= 2


def test_export_and_results(rankings, tmp_path):
    for rater in ("ann", "bob"):
        rank_by_brightness(rankings, rater, 1)
    rankings.rank(1, "cy", [1, 1, 1, 1])
    assert counted.export(rankings.file, tmp_path / "lists" / "train.parquet", "lists", QUIET) == 1
    row = pd.read_parquet(tmp_path / "lists" / "train.parquet").iloc[0]
    scores = [list(of_picture) for of_picture in row["scores"]]
    assert scores == [[1, 1, 4], [2, 2, 4], [3, 3, 4], [4, 4, 4]]
    (example,) = open_pairs(tmp_path / "lists")
    assert example.scores == tuple(sorted(win_rate_labels(scores), reverse=True))
    assert example.images[0].load().getpixel((0, 0))[0] == MODELS["inpo"]
    assert counted.export(rankings.file, tmp_path / "pairs" / "train.parquet", "majority", QUIET) == 6
    assert len(open_pairs(tmp_path / "pairs")) == 6
    found = counted.results(rankings.file, QUIET)
    assert [row["model"] for row in found["ranking"]] == ["inpo", "mapo", "dpo", "base"]
    assert {row["votes"] for row in found["ranking"]} == {3}
    assert found["agreement"]["shared_tasks"] == 6


def test_how_many_can_be_ranked(diffalign, named, tmp_path):
    folders = [tmp_path / name for name in MODELS]
    for count in (2, 5, 10):
        code, said = diffalign("label", *folders, "--rank", count, "--votes", tmp_path / "v.sqlite")
        assert code == 2
        assert "--rank takes 3 to 9 pictures" in said
    with pytest.raises(DataError, match="no ranking"):
        with Rankings(tmp_path / "empty.sqlite"):
            counted.export(tmp_path / "empty.sqlite", tmp_path / "x.parquet", "lists", QUIET)
    with pytest.raises(UserError, match="--as must be one of"):
        counted.export(tmp_path / "empty.sqlite", tmp_path / "x.parquet", "list", QUIET)
