import numpy as np
import pytest
import torch

from diffalign.data import win_rate_labels
from tests import golden


def test_official_formula():
    record = golden.load("evaluation")["synpic_phi"]
    scores = np.array(record["inputs"]["scores_by_scorer"]).T  # [k,n]
    k, n = scores.shape
    golden.assert_close(record, "wins", torch.from_numpy(win_rate_labels(scores) * n * (k - 1)))
    # The record gives phi with nine decimals, but a tolerance below that.
    np.testing.assert_allclose(win_rate_labels(scores), record["expected"]["phi"], rtol=0, atol=5.1e-10)


def test_equal_scores_are_a_win_for_neither():
    assert win_rate_labels([[1.0], [1.0], [0.0]]).tolist() == [0.5, 0.5, 0.0]
    assert win_rate_labels([[2.0, 3.0], [2.0, 3.0]]).tolist() == [0.0, 0.0]


def test_a_pair_and_one_scorer_give_the_winner():
    assert win_rate_labels([[0.2], [0.7]]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_only_the_order_within_a_scorer_counts(seed):
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=(5, 4))
    phi = win_rate_labels(scores)
    assert 0 <= phi.min() < phi.max() <= 1
    assert phi.mean() == pytest.approx(0.5)  # every comparison has one winner
    order = draw.permutation(5)
    assert win_rate_labels(scores[order]).tolist() == phi[order].tolist()
    assert win_rate_labels(scores[:, ::-1]).tolist() == phi.tolist()
    assert win_rate_labels(np.exp(scores) * [1, 10, 1e6, 0.1] + 3).tolist() == phi.tolist()


@pytest.mark.parametrize("scores", [np.zeros((1, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_wrong_shapes_are_refused(scores):
    with pytest.raises(ValueError, match="k >= 2 images"):
        win_rate_labels(scores)
