"""Hinge, IPO and robust DPO against the diffusers script and the written-down formulas."""

import pytest

from diffalign.objectives import load
from tests import golden
from tests.objectives.records import RECORDS, assert_loss_and_gradients, golden_errors


def records(prefix):
    return [name for name in RECORDS if name.startswith(prefix)]


@pytest.mark.parametrize("name", records("hinge_c"))
def test_hinge(name):
    assert_loss_and_gradients(RECORDS[name], load("hinge", beta=2 * RECORDS[name]["hyperparameters"]["b"]))


@pytest.mark.parametrize("name", records("hf_hinge_"))
def test_hinge_of_the_diffusers_script(name):
    assert_loss_and_gradients(RECORDS[name], load("hinge", beta=2 * RECORDS[name]["hyperparameters"]["beta"]))


@pytest.mark.parametrize("name", records("ipo_scaled_"))
def test_ipo(name):
    assert_loss_and_gradients(RECORDS[name], load("ipo", beta=2 * RECORDS[name]["hyperparameters"]["b"]))


@pytest.mark.parametrize("name", records("hf_ipo_"))
def test_ipo_is_the_papers_times_tau_squared(name):
    record = RECORDS[name]
    tau = record["hyperparameters"]["tau"]
    errors, _ = golden_errors(record)
    golden.assert_close(record, "per_example_loss", load("ipo", beta=2 * tau).loss(errors) / tau**2)


@pytest.mark.parametrize("name", records("robust_c"))
def test_robust_dpo(name):
    given = RECORDS[name]["hyperparameters"]
    objective = load("robust_dpo", beta=2 * given["b"], label_smoothing=given["label_smoothing"])
    assert_loss_and_gradients(RECORDS[name], objective)


def test_robust_dpo_without_flips_is_dpo():
    errors, _ = golden_errors(RECORDS[records("robust_c")[0]])
    assert load("robust_dpo", label_smoothing=0.0).loss(errors).equal(load("dpo").loss(errors))
