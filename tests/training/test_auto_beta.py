"""The automatic beta against its golden, and over several steps."""

import math

import pytest
import torch
from torch import tensor

from diffalign.objectives import PairErrors, load
from diffalign.training.auto_beta import AutoBeta
from tests import golden

RECORDS = golden.load("objectives")


@pytest.mark.parametrize("name", ["auto_beta_flow_dpo_c1", "auto_beta_flow_dpo_c2"])
def test_simpletuners_first_step(name):
    record = RECORDS[name]
    given, scale = record["hyperparameters"], record["hyperparameters"]["elements_per_image"]
    # Its errors are sums over the elements of an image.
    m_w, m_l, r_w, r_l = (scale * tensor(record["inputs"][key]) for key in ("m_w", "m_l", "r_w", "r_l"))
    errors = PairErrors(policy_w=m_w, policy_l=m_l, reference_w=r_w, reference_l=r_l)
    auto = AutoBeta(given["target_gradient_factor"], limits=(given["beta_min"], given["beta_max"]))
    auto.observe(errors.margin)
    auto.after_step(0)
    golden.assert_close(record, "margin_ema", auto.average)
    golden.assert_close(record, "beta", auto.beta)
    golden.assert_close(record, "per_example_loss", auto.applied_to(load("dpo")).loss(errors))


def test_the_average_margin_keeps_the_gradient_factor_asked_for():
    auto = AutoBeta(0.2, decay=0.5, limits=(1e-6, 1e9))
    for step, margins in enumerate([[0.001, -0.003], [0.004, 0.004]]):
        auto.observe(tensor(margins[:1]))
        auto.observe(tensor(margins[1:]))
        auto.after_step(step)
    assert auto.average == pytest.approx(0.5 * 0.002 + 0.5 * 0.004)
    logit = auto.beta / 2 * auto.average
    assert 1 / (1 + math.exp(logit)) == pytest.approx(0.2)


def test_it_leaves_the_objective_alone_until_it_has_seen_a_margin():
    auto, dpo = AutoBeta(0.2), load("dpo", beta=123.0)
    assert auto.applied_to(dpo) == dpo
    auto.observe(torch.zeros(4))
    auto.after_step(0)
    assert auto.applied_to(dpo) == dpo
    auto.observe(torch.full((4,), 1e-12))
    auto.after_step(1)
    assert auto.applied_to(dpo).beta == 1e5  # the upper limit


def test_a_saved_average_goes_on():
    auto, other = AutoBeta(0.2), AutoBeta(0.2)
    auto.observe(tensor([0.01]))
    auto.after_step(0)
    other.load_state_dict(auto.state_dict())
    assert other.beta == auto.beta != None  # noqa: E711
