"""A run of `diffalign score` that is killed, extended, shared among processes, or given broken pictures."""

import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import reward_models
from diffalign.errors import DataError, UserError
from diffalign.jobs.scoring import engine, score
from diffalign.jobs.scoring.decode import KEY, Decoder
from diffalign.jobs.scoring.items import Item
from diffalign.jobs.scoring.store import Identity, Store, read_journal
from reward_models.pickscore import PickScore
from tests.jobs.material import PROMPTS, png

QUIET = Console(quiet=True)
COUNT = 24
FORK = multiprocessing.get_context("fork")
BATCHES = score.Options(batch_size=4, workers=0)


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(COUNT):
        (pictures / f"{i}.png").write_bytes(png(10 * i, i))
    return pictures


@pytest.fixture
def judge(scorer_folders):
    return [f"pickscore={scorer_folders['pickscore']}"]


def run(folder, wanted, options=BATCHES, out="scores.parquet", **more):
    options, prompt = {"options": options, "console": QUIET} | more, PROMPTS[0]
    return score.score_images([str(folder)], folder.parent / out, wanted, prompt=prompt, **options)


@pytest.fixture
def counted(monkeypatch):
    """Return the batch sizes that the network saw, in this process."""
    sizes, inner = [], PickScore.score_prepared
    monkeypatch.setattr(PickScore, "score_prepared", lambda self, x, p: sizes.append(len(x)) or inner(self, x, p))
    return sizes


def run_slowly(folder, wanted):
    """Score with a pause after every batch, to be killed in between."""
    torch.set_num_threads(1)
    inner = PickScore.score_prepared
    PickScore.score_prepared = lambda self, x, p: (time.sleep(0.2), inner(self, x, p))[1]
    run(folder, wanted)


def test_a_killed_run_goes_on_and_scores_nothing_twice(folder, judge, counted):
    child = FORK.Process(target=run_slowly, args=(folder, judge))
    child.start()
    parts = folder.parent / "scores.parquet.parts"
    deadline = time.monotonic() + 60
    while sum(len(read_journal(file)) for file in parts.glob("journal-*")) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (folder.parent / "scores.parquet").exists()
    survived = sum(len(read_journal(file)) for file in parts.glob("journal-*"))
    assert 8 <= survived < COUNT
    table = run(folder, judge)
    assert sum(counted) == COUNT - survived
    expected = run(folder, judge, out="again.parquet")
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5)
    assert len(table) == COUNT
    assert table["score"].nunique() == COUNT


def test_a_torn_journal_gives_its_whole_batches(tmp_path):
    store, identity = Store(tmp_path), Identity("s", "w", "p")
    keys = np.array([bytes([i]) * 31 + b"\0" for i in range(1, 7)], dtype=KEY)  # a hash may end in zeros
    for start in (0, 2, 4):
        store.add(identity, keys[start : start + 2], np.arange(start, start + 2, dtype=np.float32))
    [journal] = tmp_path.glob("journal-*")
    content = journal.read_bytes()
    seen = set()
    for length in [*range(0, len(content), 40), len(content)]:
        journal.write_bytes(content[:length])
        [known] = Store(tmp_path).known([identity])
        assert known.of(keys[: len(known.keys)]).tolist() == list(range(len(known.keys)))
        seen.add(len(known.keys))
    assert seen == {0, 2, 4, 6}
    journal.write_bytes(content)
    store.seal()
    assert not list(tmp_path.glob("journal-*"))
    [known, other] = store.known([identity, Identity("s", "other weights", "p")])
    assert known.of(keys).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isnan(other.of(keys)).all()


def test_another_scorer_computes_only_its_own_scores(folder, judge, counted, scorer_folders):
    first = run(folder, judge)
    both = run(folder, [*judge, f"hpsv2={scorer_folders['hpsv2']}"])
    assert sum(counted) == COUNT
    assert both["scorer"].value_counts().to_dict() == {"pickscore": COUNT, "hpsv2": COUNT}
    assert both["score"].tolist()[:COUNT] == first["score"].tolist()
    run(folder, judge, score.Options(fresh=True, workers=0))
    assert sum(counted) == 2 * COUNT


def test_a_score_belongs_to_the_picture_not_to_its_file(folder, judge, counted):
    before = run(folder, judge)
    (folder / "0.png").rename(folder / "99.png")
    (folder / "5.png").write_bytes(png(200, 77))
    after = run(folder, judge)
    assert sum(counted) == COUNT + 1
    old, new = (t.set_index("image")["score"] for t in (before, after))
    assert len(old.index.difference(new.index)) == 1
    assert old.drop(old.index.difference(new.index)).equals(new.reindex(old.index.intersection(new.index)))


def test_other_weights_are_other_scores(folder, judge, counted, scorer_folders, tmp_path):
    run(folder, judge)
    scorer = reward_models.load("pickscore", scorer_folders["pickscore"])
    next(scorer.module.parameters()).data += 0.01
    scorer.save(tmp_path / "other")
    run(folder, [f"pickscore={tmp_path / 'other'}"])
    assert sum(counted) == 2 * COUNT


def share(folder, wanted, environment, options):
    torch.set_num_threads(1)
    os.environ.update(environment)
    run(folder, wanted, options, out="shared.parquet")


@pytest.mark.parametrize("machines", [False, True])
def test_two_processes_give_what_one_gives(folder, judge, machines):
    (folder / "3.png").write_bytes(b"no picture")
    alone = run(folder, judge)
    jobs = []
    for rank in range(2):
        environment = {} if machines else {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        options = score.Options(batch_size=4, workers=0, shard=f"{rank + 1}/2" if machines else None)
        jobs.append(FORK.Process(target=share, args=(folder, judge, environment, options)))
        jobs[-1].start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    together = pd.read_parquet(folder.parent / "shared.parquet")
    pd.testing.assert_frame_equal(together, alone, rtol=1e-5)
    assert len(together) == COUNT - 1
    assert len(list((folder.parent / "shared.parquet.parts").glob("part-*"))) == 2


def test_what_another_machine_left_of_other_pictures_is_no_part_of_these(folder, judge, tmp_path):
    halves = [score.Options(batch_size=4, workers=0, shard=f"{part}/2") for part in (1, 2)]
    assert run(folder, judge, halves[0]) is None
    assert run(folder, judge, halves[1]) is not None
    (folder / f"{COUNT - 1}.png").write_bytes(png(3, 200))  # the same name, in the part of the second
    (folder.parent / "scores.parquet").unlink()
    assert run(folder, judge, halves[0]) is None  # it waits for the second
    again = run(folder, judge, halves[1])
    pd.testing.assert_frame_equal(again, run(folder, judge, out="alone.parquet"), rtol=1e-5)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_change_nothing(folder, judge, monkeypatch, start):
    alone = run(folder, judge)
    monkeypatch.setattr(engine, "START", start)
    helped = run(folder, judge, score.Options(batch_size=4, workers=1), out="helped.parquet")
    assert helped["score"].tolist() == alone["score"].tolist()


def test_a_worker_that_dies_is_one_sentence_and_costs_what_it_had(folder, judge, monkeypatch):
    inner, parent = Decoder.__getitem__, os.getpid()

    def dying(decoder, items):
        if items[0].position == 12 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(decoder, items)

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "__getitem__", dying)
        with pytest.raises(DataError, match=r"A process that decodes pictures died .*run the same command again"):
            run(folder, judge, score.Options(batch_size=4, workers=1))
    assert not (folder.parent / "scores.parquet").exists()
    pd.testing.assert_frame_equal(run(folder, judge), run(folder, judge, out="alone.parquet"), rtol=1e-5)


def test_what_a_worker_needs_can_be_sent_to_it(folder, judge):
    recipe = reward_models.load("pickscore", judge[0].partition("=")[2]).recipe
    decoder = Decoder((recipe, None), (np.empty(0, KEY), np.empty(0, KEY)))
    items = [Item(i, "x", PROMPTS[0], (folder / f"{i}.png").read_bytes()) for i in range(3)]
    here, there = decoder[items], pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(decoder))[items]))
    assert torch.equal(here.of(recipe, [0, 2]), there.of(recipe, [0, 2]))
    assert [image.size for image in there.of(None, [1])] == [(32, 32)]
    assert here.keys.tolist() == there.keys.tolist()
    assert all(item.data is None for item in there.items)


def test_broken_pictures_are_listed_and_left_out(folder, judge):
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.png").write_bytes(png(0)[:60])
    table = run(folder, judge)
    assert len(table) == COUNT - 2
    lines = [json.loads(line) for line in (folder.parent / "scores.broken.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [str(folder / "3.png"), str(folder / "4.png")]
    assert lines[0]["reason"] == "it is not a picture"
    (folder / "3.png").write_bytes(png(1))
    (folder / "4.png").write_bytes(png(2))
    run(folder, judge)
    assert not (folder.parent / "scores.broken.jsonl").exists()


def test_strict_stops_at_the_first_broken_picture(folder, judge):
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png: it is not a picture.*--skip-broken"):
        run(folder, judge, score.Options(strict=True, workers=0))
    for file in folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="Nothing is left to score"):
        run(folder, judge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": "many"}, "--batch-size"),
        ({"workers": -1}, "--workers"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        score.Options(**options)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "a", "1-2"])
def test_unusable_shards_are_named(folder, judge, shard):
    with pytest.raises(UserError, match="--shard must be i/n"):
        run(folder, judge, score.Options(shard=shard))


def test_fresh_is_refused_where_it_would_delete_the_work_of_others(folder, judge):
    run(folder, judge)
    with pytest.raises(UserError, match="delete"):
        run(folder, judge, score.Options(shard="1/2", fresh=True))
