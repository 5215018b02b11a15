"""Supervised fine-tuning: the loss is the error."""

import torch
from torch import tensor

from diffalign.objectives import SingleErrors, load


def test_loss_and_gradient_are_those_of_the_error():
    policy = tensor([0.04, 0.9, 0.0], requires_grad=True)
    loss = load("sft").loss(SingleErrors(policy=policy))
    loss.sum().backward()
    assert torch.equal(loss, policy)
    assert torch.equal(policy.grad, torch.ones(3))


def test_takes_winners_and_no_reference():
    objective = load("sft")
    assert objective.chosen_only
    assert objective.layout == "single"
    assert not objective.needs
