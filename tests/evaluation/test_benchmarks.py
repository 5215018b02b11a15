"""GenEval, DPG-Bench, HPSv2's benchmark, K-Sort Arena and accuracies: golden numbers, and pictures that are known."""

import random

import numpy as np
import pandas as pd
import pytest

from diffalign.errors import DataError, UserError
from diffalign.evaluation import accuracy, arena, dpg, geneval, hps_benchmark
from diffalign.shapes import benchmarks
from diffalign.shapes.captions import parse
from diffalign.shapes.render import render
from tests.golden import assert_close, hash_uniform, load

GOLDENS = load("evaluation")


def named(prefix):
    return [record for name, record in GOLDENS.items() if name.startswith(prefix)]


def identify(record):
    return record["id"]


@pytest.mark.parametrize("record", named("inversion_score"), ids=identify)
def test_inversion_score(record):
    inputs = record["inputs"]
    assert_close(record, "score", accuracy.inversion_score(inputs["rank_pred"], inputs["rank_gt"]))


@pytest.mark.parametrize("record", named("imagereward_pair_accuracy"), ids=identify)
def test_ranked_accuracy(record):
    assert_close(record, "accuracy", accuracy.ranked_accuracy(record["inputs"]["scores"], record["inputs"]["ranks"]))


@pytest.mark.parametrize("record", named("tie_aware_accuracy"), ids=identify)
def test_tie_aware_accuracy(record):
    inputs, threshold = record["inputs"], record["hyperparameters"]["threshold"]
    assert_close(record, "accuracy", accuracy.tie_aware_accuracy(inputs["probs"], inputs["label_0"], threshold))


@pytest.mark.parametrize("record", [r for r in named("ksort") if r["id"] != "ksort_variance_factor"], ids=identify)
def test_ratings_after_one_vote(record):
    inputs = record["inputs"]
    mean, variance = arena.update(inputs["mu"], inputs["sigma2"], inputs["rank"], record["hyperparameters"]["beta"])
    assert_close(record, "mu", mean.tolist())
    assert_close(record, "sigma2", variance.tolist())
    assert_close(record, "conservative_score", (mean - 3 * np.sqrt(variance)).tolist())


def test_the_published_variance_turns_negative_and_ours_does_not():
    record = GOLDENS["ksort_variance_factor"]
    sigma, beta = record["hyperparameters"]["sigma"], record["hyperparameters"]["beta"]
    fresh = {k: ([25.0] * k, [sigma**2] * k, list(range(k))) for k in record["inputs"]["K"]}
    assert_close(record, "factor", [float(arena.variance_factors(*vote, beta)[0]) for vote in fresh.values()])
    for k, vote in fresh.items():
        _, variance = arena.update(*vote, beta)
        assert (variance > 0).all(), k
        assert (variance < sigma**2).all(), k


def test_extreme_ratings_stay_finite():
    mean, variance = arena.update([1000.0, -1000.0], [1e-6, 1e-6], [2, 1])
    assert np.isfinite(mean).all()
    assert (variance > 0).all()


def test_an_arena_finds_the_order_with_few_votes():
    skill = {f"model-{i}": float(i) for i in range(8)}
    rng = np.random.default_rng(0)
    ring = arena.Arena(list(skill))
    for _ in range(60):
        match = ring.next_match(4)
        shown = np.array([3 * skill[name] for name in match]) + rng.normal(0, 2, 4)
        ring.vote(match, (-shown).argsort().argsort() + 1)
    ranked = [int(name[-1]) for name in ring.table()["model"]]
    assert abs(np.corrcoef(ranked, range(7, -1, -1))[0, 1]) > 0.95
    played = ring.table()["votes"]
    assert played.max() - played.min() <= 20
    assert (ring.met[~np.eye(8, dtype=bool)] > 0).all()  # every pair met


def test_opponents_are_of_like_skill_once_all_have_met():
    ring = arena.Arena(list("abcd"), exploration=0.0)
    for pair in (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")):
        for _ in range(6):
            ring.vote(pair, [1, 2])
    ring._played[0] = 0
    assert ring.next_match(2) == ["a", "b"]


def test_matches_and_votes_that_cannot_be():
    ring = arena.Arena(["dpo", "mapo"])
    with pytest.raises(DataError, match='Did you mean "mapo"'):
        ring.vote(["dpo", "mapoo"], [1, 2])
    with pytest.raises(DataError, match="every model once"):
        ring.vote(["dpo", "dpo"], [1, 2])
    with pytest.raises(UserError, match="2 to 2 models, got 4"):
        ring.next_match(4)
    with pytest.raises(UserError, match="different names"):
        arena.Arena(["dpo", "dpo"])


@pytest.mark.parametrize("record", named("geneval_position"), ids=identify)
def test_relative_position(record):
    boxes = record["inputs"]["box_a"], record["inputs"]["box_b"]
    found = geneval.relative_position(*boxes, record["hyperparameters"]["position_threshold"])
    assert sorted(found) == record["expected"]["relations"]


@pytest.mark.parametrize("record", named("geneval_case"), ids=identify)
def test_geneval_verdicts(record):
    inputs = record["inputs"]
    verdict = geneval.judge(inputs["objects"], inputs["colors_of_boxes"], inputs["metadata"])
    assert verdict.correct == record["expected"]["correct"]
    assert bool(verdict.reasons) != verdict.correct


def test_geneval_overall():
    record = GOLDENS["geneval_overall"]
    assert_close(record, "overall", geneval.overall(record["inputs"]["tasks"]))


CAPTIONS = (
    "two red circles on a blue background",
    "three green squares on a white background",
    "a small yellow star on the left on a black background",
    "a pink diamond on a gray background",
)


@pytest.fixture
def pictures():
    return [render(parse(caption), random.Random(seed)) for seed, caption in enumerate(CAPTIONS)]


def test_geneval_on_pictures_that_show_it_and_on_others(pictures):
    records = [benchmarks.geneval_record(caption) for caption in CAPTIONS]
    results = geneval.evaluate(pictures, records, benchmarks.ShapesDetector())
    assert results["correct"].tolist() == [True] * 4, results["reason"].tolist()
    summary = geneval.summarise(results)
    assert summary["overall"] == summary["pictures"] == summary["prompts"] == 1.0
    assert summary["tasks"].keys() == {"count", "size and position", "plain"}
    swapped = geneval.evaluate(pictures[1:] + pictures[:1], records, benchmarks.ShapesDetector())
    assert not swapped["correct"].any()
    assert swapped["reason"][0] == "expected 2 of circle, found 0"


def test_geneval_leaves_out_what_a_detector_is_not_sure_of():
    class Unsure:
        def detect(self, image, classes):
            return {name: [((0, 0, 1, 1), 0.5), ((5, 0, 6, 1), 0.95)] for name in classes}

        def colours(self, image, name, boxes):
            return ["red" for _ in boxes]

    record = {"tag": "two_object", "prompt": "p", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert geneval.evaluate([None], [record], Unsure())["correct"].all()
    assert not geneval.evaluate([None], [record | {"tag": "counting"}], Unsure())["correct"].any()


@pytest.mark.parametrize("record", named("dpg"), ids=identify)
def test_dpg_scores(record):
    inputs = record["inputs"]
    tiles = [{int(key): value for key, value in tile.items()} for tile in inputs["answers_per_tile"]]
    parents = {int(key): value for key, value in inputs["parents"].items()}
    assert_close(record, "score", dpg.prompt_score(inputs["question_order"], tiles, parents))


def test_dpg_on_pictures_that_show_it_and_on_others(pictures):
    questions = {c: [dpg.Question(**fields) for fields in benchmarks.dpg_questions(c)] for c in CAPTIONS}
    right = dict(zip(CAPTIONS, ([picture] * 2 for picture in pictures), strict=True))
    results = dpg.evaluate(right, questions, benchmarks.OracleAnswerer())
    assert dpg.summarise(results)["overall"] == 100
    half = right | {CAPTIONS[3]: [pictures[3], pictures[0]]}  # the other picture shows neither shape nor ground
    summary = dpg.summarise(dpg.evaluate(half, questions, benchmarks.OracleAnswerer()))
    assert summary["overall"] == pytest.approx(100 * 3.5 / 4)
    assert summary["broad"]["entity"] == pytest.approx(100 * 3.5 / 4)
    with pytest.raises(DataError, match="no picture, the first is 'two red"):
        dpg.evaluate({}, questions, benchmarks.OracleAnswerer())


def test_tiles_of_a_grid(pictures):
    side = pictures[0].width
    grid = pictures[0].resize((2 * side, 2 * side))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (side * (number % 2), side * (number // 2)))
    assert [tile.tobytes() for tile in dpg.split_tiles(grid)] == [picture.tobytes() for picture in pictures]


def test_hps_style():
    record = GOLDENS["hps_style_aggregate"]
    result = hps_benchmark.style_score(25 + 3 * hash_uniform(800, 5000).numpy())
    assert_close(record, "mean", result.mean)
    assert_close(record, "population_std_of_group_means", result.spread)
    assert_close(record, "group_means", list(result.group_means))


def test_hps_benchmark_wants_every_picture():
    styles = hps_benchmark.STYLES
    rows = [
        {"style": style, "prompt_id": 20 * s + i, "score": 0.25 + 0.01 * s + 0.001 * i}
        for s, style in enumerate(styles)
        for i in range(20)
    ]
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    result = hps_benchmark.benchmark(table, prompts=20).set_index("style")
    assert result.loc["photo", "score"] == pytest.approx(100 * (0.28 + 0.0095))
    # Ten consecutive groups of two prompts: their means are 0.002 apart.
    assert result.loc["anime", "spread"] == pytest.approx(100 * np.std(0.002 * np.arange(10)))
    assert result.loc["all", "score"] == pytest.approx(100 * table["score"].mean())
    with pytest.raises(DataError, match="19 of 19 prompts"):
        hps_benchmark.benchmark(table.drop(table.index[3]), prompts=20)
