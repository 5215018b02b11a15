"""What holds for objectives of transitions whatever the numbers."""

import math

import pytest
import torch

from diffalign import objectives
from diffalign.objectives import Transitions


def transitions(log_prob_w, log_prob_l, reference_w, reference_l, rows=slice(None), **more):
    given = {
        "log_prob_w": log_prob_w, "log_prob_l": log_prob_l,
        "reference_log_prob_w": reference_w, "reference_log_prob_l": reference_l, **more,
    }  # fmt: skip
    return Transitions(**{name: tensor[rows] for name, tensor in given.items()})


@pytest.mark.parametrize("name", ["spo", "d3po"])
def test_the_gradient_at_the_reference_pulls_both_sides_apart(name):
    log_prob = torch.randn(2, 5)
    policy = log_prob.clone().requires_grad_()
    objective = objectives.load(name)
    loss = objective.loss(transitions(*policy, *log_prob))
    assert loss.tolist() == pytest.approx([math.log(2)] * 5)
    loss.sum().backward()
    half = torch.full((5,), objective.beta / 2)
    torch.testing.assert_close(policy.grad, torch.stack([-half, half]))


@pytest.mark.parametrize("name", ["spo", "d3po"])
def test_a_side_outside_the_clip_has_no_gradient_and_the_other_has(name):
    objective, reference = objectives.load(name), torch.zeros(2, 4)
    outside = 1.01 * math.log1p(objective.ratio_clip)
    policy = torch.tensor([[outside, 0.0, -2 * outside, 0.01], [0.0, outside, 0.0, 0.01]]).requires_grad_()
    objective.loss(transitions(*policy, *reference)).sum().backward()
    assert (policy.grad == 0).tolist() == [[True, False, True, False], [False, True, False, False]]


def test_the_advantage_of_ddpo_decides_the_direction_and_the_clip_ends_it():
    objective = objectives.load("ddpo", clip_range=0.1)
    behavior, advantages = torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    policy = torch.tensor([0.0, 0.0, 0.2, -0.2]).requires_grad_()
    objective.loss(Transitions(log_prob_w=policy, behavior_log_prob=behavior, advantages=advantages)).sum().backward()
    assert policy.grad.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_outside_the_clip_only_the_drift_moves_dpok_whatever_the_advantage():
    objective, drift = objectives.load("dpok", clip_range=0.1), torch.ones(3).requires_grad_()
    policy = torch.tensor([0.0, 0.2, -0.2]).requires_grad_()  # the last is where PPO would still raise the ratio
    given = {"behavior_log_prob": torch.zeros(3), "advantages": torch.tensor([1.0, 1.0, 1.0])}
    objective.loss(Transitions(log_prob_w=policy, drift=drift, **given)).sum().backward()
    assert policy.grad.tolist() == pytest.approx([-100.0, 0.0, 0.0])
    assert drift.grad.tolist() == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("name", ["spo", "d3po"])
def test_the_order_of_pairs_does_not_matter(name):
    objective, rows = objectives.load(name), torch.randperm(9)
    given = (0.05 * torch.randn(4, 9)).unbind()
    label = torch.randint(-1, 2, (9,)).float()
    plain = objective.loss(transitions(*given, label=label))
    shuffled = objective.loss(transitions(*given, rows=rows, label=label))
    assert torch.equal(shuffled, plain[rows])


def test_a_tie_has_no_gradient():
    policy = torch.randn(2, 3).requires_grad_()
    loss = objectives.load("d3po").loss(transitions(*policy, *torch.randn(2, 3), label=torch.zeros(3)))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert not policy.grad.any()
