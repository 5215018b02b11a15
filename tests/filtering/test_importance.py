"""FiFA's importance score: the reconstruction's goldens, its terms, and what normalisation is for."""

import numpy as np
import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.filtering import ImportanceSettings, importance, nearest_distances, select
from diffalign.filtering.importance import log_distance, normalised
from tests import golden

GOLDENS = ("fifa_k1_a0.5_g0.5", "fifa_k3_a0.5_g0.5")


@pytest.mark.parametrize("name", GOLDENS)
def test_reconstruction_agrees_with_its_golden(name):
    record = golden.load("evaluation")[name]
    inputs, constants = record["inputs"], record["hyperparameters"]
    k = constants["k"]
    settings = ImportanceSettings(
        alpha=constants["alpha"], gamma=constants["gamma"], neighbours=k, normalise="none", epsilon=0.0
    )
    distance = nearest_distances(torch.tensor(inputs["embedding_rows_normalised"]), k)[:, k - 1]
    golden.assert_close(record, "knn_distance", distance.tolist())
    golden.assert_close(record, "log_distance", log_distance(distance, settings).tolist())
    margin, quality = np.array(inputs["margin"]), np.array(inputs["quality_0_10"])
    value = importance(margin, quality, distance, np.arange(len(margin)), settings)
    golden.assert_close(record, "importance", value.tolist())
    assert select(value, constants["K"]).tolist() == record["expected"]["selected"]


def test_prompts_give_their_terms_to_all_their_pairs():
    settings = ImportanceSettings(normalise="none", alpha=2.0, gamma=3.0, epsilon=0.0)
    margin = np.array([1.0, 2.0, 3.0])
    value = importance(margin, np.array([10.0, 0.0]), np.array([np.e, 1.0]), np.array([0, 1, 0]), settings)
    assert np.allclose(value, [1 + 2 * (1 + 3), 2.0, 3 + 2 * (1 + 3)])


def test_missing_terms_are_left_out_and_missing_margins_stay_missing():
    settings = ImportanceSettings(normalise="none")
    value = importance(np.array([1.0, np.nan]), None, None, np.array([0, 0]), settings)
    assert value[0] == 1.0
    assert np.isnan(value[1])


def test_zscores_make_the_choice_independent_of_the_scorers_scale():
    generator = np.random.default_rng(0)
    margin, quality, distance = generator.random(200), 10 * generator.random(200), 0.1 + generator.random(200)
    chosen = {}
    for how in ("zscore", "minmax", "none"):
        settings = ImportanceSettings(normalise=how, epsilon=0.0)
        both = [importance(m, quality, distance, np.arange(200), settings) for m in (margin, 100 * margin)]
        chosen[how] = [set(select(value, 20).tolist()) for value in both]
    assert chosen["zscore"][0] == chosen["zscore"][1]
    assert chosen["minmax"][0] == chosen["minmax"][1]
    assert chosen["none"][0] != chosen["none"][1]


def test_normalisation_ignores_missing_values_and_bears_constants():
    values = np.array([1.0, np.nan, 3.0])
    assert np.allclose(normalised(values, "zscore"), [-1, np.nan, 1], equal_nan=True)
    assert np.allclose(normalised(values, "minmax"), [0, np.nan, 1], equal_nan=True)
    assert normalised(np.full(7, 0.1), "zscore").tolist() == [0.0] * 7
    assert normalised(np.array([]), "zscore").shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalise": "z-score"}, 'Did you mean "zscore"'),
        ({"margin": "abs"}, "Use absolute, signed"),
        ({"alpha": -1.0}, "must not be negative, got -1.0"),
        ({"gamma": float("nan")}, "must not be negative"),
        ({"neighbours": 0}, "at least 1, got 0"),
        ({"max_per_prompt": 0}, "at least 1, got 0"),
        ({"quality_scale": 0.0}, "must be positive, got 0.0"),
        ({"margin_cap": -2.0}, "must be positive, got -2.0"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ImportanceSettings(**wrong)
