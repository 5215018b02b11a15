"""Win rates and intervals against the golden numbers, and what they do at their edges."""

import math

import numpy as np
import pytest

from diffalign.errors import DataError, UserError
from diffalign.evaluation.statistics import (
    binomial_test,
    holm,
    mean_difference,
    paired_bootstrap,
    prompt_wins,
    seeded_bootstrap,
    wilson_interval,
    win_rate,
)
from tests.golden import assert_close, hash_uniform, load

GOLDENS = load("evaluation")


def test_win_rate_gives_ties_half():
    record = GOLDENS["win_rate_ties"]
    a, b = record["inputs"]["score_a"], record["inputs"]["score_b"]
    assert_close(record, "per_prompt", prompt_wins(a, b).tolist())
    assert_close(record, "win_rate", float(win_rate(a, b)))
    # The record asks for more digits than the nine it was printed with.
    assert_close(record, "mean_difference", float(f"{mean_difference(a, b):.9g}"))
    assert win_rate(b, a) == pytest.approx(1 - win_rate(a, b))


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("bootstrap_explicit")])
def test_bootstrap_with_given_resamples(name):
    record, pair = GOLDENS[name], GOLDENS["win_rate_ties"]["inputs"]
    options = {"level": record["hyperparameters"]["confidence"], "indices": record["inputs"]["resample_indices"]}
    a, b = pair["score_a"], pair["score_b"]
    assert_close(record, "win_rate_interval", list(paired_bootstrap(a, b, **options)))
    assert_close(record, "mean_difference_interval", list(paired_bootstrap(a, b, mean_difference, **options)))


def test_bootstrap_of_five_hundred_prompts():
    record = GOLDENS["bootstrap_large"]
    a, b = 2 * hash_uniform(500, 3000).numpy(), 2 * hash_uniform(500, 3001).numpy() - 0.1
    indices = np.floor(500 * hash_uniform(500_000, 3002).numpy()).astype(int).reshape(1000, 500)
    assert_close(record, "win_rate", float(win_rate(a, b)))
    assert_close(record, "win_rate_interval", list(paired_bootstrap(a, b, indices=indices)))
    assert_close(record, "mean_difference_interval", list(paired_bootstrap(a, b, mean_difference, indices=indices)))
    assert_close(record, "mean_difference", float(mean_difference(a, b)))


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("wilson")])
def test_wilson_and_binomial(name):
    record = GOLDENS[name]
    k, n = record["inputs"]["k"], record["inputs"]["n"]
    assert_close(record, "interval", list(wilson_interval(k, n, record["hyperparameters"]["confidence"])))
    assert_close(record, "binomial_p_two_sided", binomial_test(k, n))


def test_bootstrap_draws_are_seeded_and_do_not_depend_on_chunks(monkeypatch):
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.2, 1, 40), generator.normal(0, 1, 40)
    whole = paired_bootstrap(a, b, mean_difference, n=200, seed=1)
    assert whole != paired_bootstrap(a, b, mean_difference, n=200, seed=2)
    monkeypatch.setattr("diffalign.evaluation.statistics._CHUNK_ELEMENTS", 40 * 7)
    assert paired_bootstrap(a, b, mean_difference, n=200, seed=1) == whole
    assert whole.low < mean_difference(a, b) < whole.high


def test_bootstrap_covers_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        difference = generator.normal(0.3, 1, 60)
        interval = paired_bootstrap(difference, np.zeros(60), mean_difference, n=400, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_run_has_the_interval_of_its_prompts():
    generator = np.random.default_rng(4)
    a, b = generator.normal(0.2, 1, 40), generator.normal(0, 1, 40)
    alone = paired_bootstrap(a, b, mean_difference, n=500, seed=2)
    assert seeded_bootstrap(a, b, mean_difference, n=500, seed=2) == pytest.approx(alone)


def test_runs_that_disagree_widen_the_interval():
    prompts = np.random.default_rng(5).normal(0, 0.1, (1, 200))
    agreeing = np.repeat(prompts, 3, axis=0)
    apart = agreeing + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = (seeded_bootstrap(a, np.zeros(200), mean_difference, n=2000) for a in (agreeing, apart))
    assert narrow.high - narrow.low < 0.05
    # With three runs one resample in 27 has the worst only: the ends are among what two or three runs agree on.
    assert wide.low < -0.6
    assert wide.high > 0.6


def test_coverage_over_runs_and_prompts():
    generator, hits = np.random.default_rng(1), 0
    for trial in range(100):
        table = (
            0.3 + generator.normal(0, 0.2, (6, 1)) + generator.normal(0, 1, (1, 60)) + generator.normal(0, 1, (6, 60))
        )
        interval = seeded_bootstrap(table, np.zeros(60), mean_difference, n=400, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert hits >= 90


def test_one_prompt_has_no_interval():
    assert all(math.isnan(end) for end in paired_bootstrap([1.0], [0.0]))


def test_binomial_without_trials():
    assert binomial_test(0, 0) == 1.0


def test_holm_by_hand():
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1 is 0.03, 0.06, 0.04; the last is raised to the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([], [], "at least one prompt"), ([1.0], [1.0, 2.0], "shapes"), ([1.0, math.nan], [0.0, 0.0], "not finite")],
)
def test_scores_that_cannot_be_compared(a, b, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(a, b)


def test_level_outside_zero_and_one():
    with pytest.raises(UserError, match=r"got 95"):
        wilson_interval(1, 2, level=95)
