"""Diffusion-DPO against the authors' code, the diffusers script and the closed form."""

import math

import pytest
import torch
from torch import tensor

from diffalign.errors import ConfigError
from diffalign.objectives import PairErrors, load
from tests import golden
from tests.objectives.records import RECORDS, assert_loss_and_gradients, golden_errors


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("dpo_")])
def test_authors_code(name):
    record = RECORDS[name]
    objective = load("dpo", beta=record["hyperparameters"]["beta"])
    errors, _ = golden_errors(record)
    assert_loss_and_gradients(record, objective)
    golden.assert_close(record, "logit", objective.logit(errors))


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("hf_sigmoid_")])
def test_diffusers_script_has_half_our_beta(name):
    record = RECORDS[name]
    assert_loss_and_gradients(record, load("dpo", beta=2 * record["hyperparameters"]["beta"]))
    errors, _ = golden_errors(record)
    golden.assert_close(record, "implicit_acc", errors.implicit_accuracy.mean())


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("cdpo_")])
def test_label_smoothing_is_conservative_dpo(name):
    record = RECORDS[name]
    hyperparameters = record["hyperparameters"]
    smoothing = hyperparameters["label_smoothing"]
    assert_loss_and_gradients(record, load("dpo", beta=2 * hyperparameters["b"], label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_log_2_where_policy_equals_reference(smoothing):
    same_w, same_l = tensor([0.0, 0.03, 900.0]), tensor([1e4, 0.05, 1e-12])
    errors = PairErrors(policy_w=same_w, policy_l=same_l, reference_w=same_w, reference_l=same_l)
    objective = load("dpo", beta=5000.0, label_smoothing=smoothing)
    assert torch.equal(objective.logit(errors), torch.zeros(3))
    assert torch.equal(objective.loss(errors), torch.full((3,), math.log(2)))


def test_defaults_are_those_of_the_authors_launchers():
    assert load("dpo") == load("dpo", beta=5000.0, label_smoothing=0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("beta", value) for value in (0.0, -1.0, math.nan, math.inf, True, "5e3", None)],
        *[("label_smoothing", value) for value in (-0.1, 0.5, 1.0, math.nan, False)],
    ],
)
def test_hyperparameters_out_of_range(key, value):
    with pytest.raises(ConfigError, match=rf'"objective.{key}" must be a finite number >.*, got '):
        load("dpo", **{key: value})
