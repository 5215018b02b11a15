"""The rankings that FiFA is compared with."""

import numpy as np
import pandas as pd
import pytest

from diffalign.filtering import METHODS, ImportanceSettings, rank, select
from diffalign.filtering.baselines import pair_quality, round_robin, uniform
from tests import golden


@pytest.fixture
def pairs():
    """Return ten pairs of four prompts; prompt d is alone in its corner."""
    generator = np.random.default_rng(0)
    prompts = list("aaaabbbccd")
    return pd.DataFrame(
        {
            "example_id": generator.integers(0, 2**63, 10),
            "prompt": prompts,
            "prompt_key": prompts,
            "score_chosen": generator.random(10),
            "score_rejected": generator.random(10),
            "text_quality": [{"a": 9.0, "b": 5.0, "c": 2.0, "d": 7.0}[prompt] for prompt in prompts],
            "distance_1": [{"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.9}[prompt] for prompt in prompts],
        }
    )


def test_pair_quality_agrees_with_its_golden():
    record = golden.load("evaluation")["quality_aware_pair_ranking"]
    inputs = record["inputs"]
    golden.assert_close(record, "quality", pair_quality(inputs["psi_w"], inputs["psi_l"], (0.0, 1.0)).tolist())


def test_pair_quality_brings_scores_to_the_unit_interval():
    assert np.allclose(pair_quality([20.0, 22.0], [18.0, 21.0]), [0.5 * 1, 1 * 0.25])
    assert np.allclose(pair_quality([1.0], [1.0]), [0.0])  # all scores equal: no pair is any good


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_every_pair_whatever_the_order_of_rows(pairs, method):
    values = rank(method, pairs, ImportanceSettings(), seed=3)
    assert np.isfinite(values).all()
    shuffled = pairs.sample(frac=1.0, random_state=1)
    again = pd.Series(rank(method, shuffled.reset_index(drop=True), ImportanceSettings(), seed=3), shuffled.index)
    assert np.allclose(again.sort_index(), values)


def test_fifa_weighs_margin_quality_and_distance(pairs):
    settings = ImportanceSettings(normalise="none", epsilon=0.0)
    margin = pairs.score_chosen - pairs.score_rejected
    expected = margin + 0.5 * (pairs.text_quality / 10 + 0.5 * np.log(pairs.distance_1))
    assert np.allclose(rank("fifa", pairs, settings), expected)
    without = ImportanceSettings(normalise="none", alpha=0.0)
    assert np.allclose(rank("fifa", pairs, without), margin)
    assert np.allclose(rank("margin", pairs, settings), margin)


def test_absolute_and_capped_margins(pairs):
    absolute = rank("margin", pairs, ImportanceSettings(margin="absolute"))
    assert np.allclose(absolute, (pairs.score_chosen - pairs.score_rejected).abs())
    signed = rank("margin", pairs, ImportanceSettings(margin_cap=0.2))
    assert np.allclose(signed, (pairs.score_chosen - pairs.score_rejected).clip(-0.2, 0.2))


def test_diverse_takes_every_prompt_before_any_second_pair(pairs):
    order = select(rank("diverse", pairs, ImportanceSettings()), 10)
    assert set(pairs.prompt.iloc[order[:4]]) == set("abcd")
    assert sorted(pairs.prompt.iloc[order[4:7]]) == ["a", "b", "c"]
    margin = pairs.score_chosen - pairs.score_rejected
    assert all(margin[i] == margin[pairs.prompt == pairs.prompt[i]].max() for i in order[:4])
    blind = pairs.drop(columns=["score_chosen", "score_rejected"])
    assert set(pairs.prompt.iloc[select(rank("diverse", blind, ImportanceSettings()), 4)]) == set("abcd")


def test_round_robin_leaves_out_missing_values():
    assert np.isnan(round_robin(np.array([1.0, np.nan]), ["a", "a"])).tolist() == [False, True]


def test_random_is_uniform_and_depends_on_the_seed():
    ids = np.arange(20_000)
    values, others = uniform(ids, 0), uniform(ids, 1)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 2000).max() < 200
    assert abs(np.corrcoef(values, others)[0, 1]) < 0.03
    assert np.array_equal(uniform(ids[::-1], 0), values[::-1])
