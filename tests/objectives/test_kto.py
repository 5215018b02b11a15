"""Diffusion-KTO against the authors' code: every utility, every baseline."""

from dataclasses import replace

import pytest
import torch
from torch import tensor

from diffalign.objectives import SingleErrors, load
from tests import golden
from tests.objectives.records import RECORDS

UTILITY = {"sigmoid": "kahneman_tversky"}
BASELINE = {"none": "batch", "sigmoid": "class_mean", "original": "mismatched"}


def parts(record):
    given, inputs = record["hyperparameters"], record["inputs"]
    objective = load(
        "kto",
        beta=given["beta"],
        utility=UTILITY.get(given["halo"], given["halo"]),
        baseline=BASELINE[given.get("bce_offset", "sigmoid")],
        lambda_desirable=given["lambda_desirable"],
        lambda_undesirable=given["lambda_undesirable"],
    )
    policy = tensor(inputs["m"], requires_grad=True)
    kl = given.get("kl", "computed")
    names = {"mismatched_policy": "m_rolled", "mismatched_reference": "r_rolled"}
    rolled = {field: tensor(inputs[key]) for field, key in names.items() if key in inputs}
    errors = SingleErrors(
        policy=policy,
        reference=tensor(inputs["r"]),
        desirable=tensor(inputs["labels"]),
        statistic=None if kl == "computed" else tensor(kl),
        **rolled,
    )
    return objective, errors, policy


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("kto_")])
def test_authors_loss(name):
    record = RECORDS[name]
    objective, errors, policy = parts(record)
    loss = objective.loss(errors)
    loss.mean().backward()
    golden.assert_close(record, "x", objective.logit(errors))
    golden.assert_close(record, "per_example_loss", loss)
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_m", policy.grad)
    if errors.statistic is None:
        baseline = objective.statistic(errors)
        golden.assert_close(record, "kl", baseline.clamp(min=0) if objective.baseline == "batch" else baseline)


@pytest.mark.parametrize("utility", ["kahneman_tversky", "loss_averse", "risk_seeking_3"])
def test_loss_at_the_reference(utility):
    error = tensor([0.1, 0.2, 0.3])
    errors = SingleErrors(policy=error, reference=error, desirable=tensor([True, False, True]))
    expected = {"kahneman_tversky": 0.5, "loss_averse": 1.6931472, "risk_seeking_3": 0.3068528}[utility]
    torch.testing.assert_close(load("kto", utility=utility).loss(errors), torch.full((3,), expected))


def test_the_batch_baseline_is_never_negative_and_is_clamped_after_averaging_over_processes():
    errors = SingleErrors(policy=tensor([0.2, 0.3]), reference=tensor([0.1, 0.1]), desirable=tensor([True, False]))
    kto = load("kto", beta=10.0)
    assert kto.statistic(errors) < 0
    torch.testing.assert_close(kto.logit(errors), tensor([-1.0, 2.0]))
    torch.testing.assert_close(kto.logit(replace(errors, statistic=tensor(0.05))), tensor([-1.5, 2.5]))


def test_mismatched_prompts_are_asked_for_only_by_their_baseline():
    assert load("kto").needs == {"reference"}
    assert load("kto", baseline="mismatched").needs == {"reference", "mismatched"}
