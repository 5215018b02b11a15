"""A reference that follows: what it holds, when, and that lending it leaves the policy untouched."""

import pytest
import torch
from torch import nn

from diffalign.denoising import FrozenDenoiser
from diffalign.training.moving_reference import MovingReference
from tests import golden


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def move(module, amount):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount


def test_an_average_lags_behind_by_its_decay():
    module = network()
    start = module.weight.detach().clone()
    reference = MovingReference(dict(module.named_parameters()), "ema", decay=0.9, every=1)
    for step in range(2):
        move(module, 1.0)
        reference.after_step(step)
    # 0.9 * (0.9 * 0 + 0.1 * 1) + 0.1 * 2
    torch.testing.assert_close(reference.weights["weight"], start + 0.29)


def test_an_average_is_that_of_linear_dpos_authors():
    record = golden.load("objectives-2026")["ema_reference_d0.95_plain"]
    weight = nn.Parameter(torch.tensor(record["inputs"]["start"]))
    reference = MovingReference({"weight": weight}, "ema", decay=record["hyperparameters"]["decay"], every=1)
    averages = []
    for step, value in enumerate(record["inputs"]["weights"]):
        weight.data = torch.tensor(value)
        reference.after_step(step)
        averages.append(reference.weights["weight"].clone())
    golden.assert_close(record, "average", torch.stack(averages))


def test_a_refreshed_reference_is_renewed_every_so_many_steps():
    module = network()
    start = module.weight.detach().clone()
    reference = MovingReference(dict(module.named_parameters()), "refresh", decay=0.9, every=2)
    move(module, 1.0)
    reference.after_step(0)
    torch.testing.assert_close(reference.weights["weight"], start)
    move(module, 1.0)
    reference.after_step(1)
    torch.testing.assert_close(reference.weights["weight"], start + 2)


def test_lending_evaluates_the_reference_and_gives_the_policy_back():
    module = network()
    reference = MovingReference(dict(module.named_parameters()), "ema", decay=0.5, every=1)
    before = module(torch.ones(1, 3)).detach()
    move(module, 1.0)
    moved = [parameter.detach().clone() for parameter in module.parameters()]
    frozen = FrozenDenoiser(module, lambda net, xt, timesteps, cond: net(xt), frozen_weights=reference.lent)
    pred = frozen(torch.ones(1, 3), torch.zeros(1), None)
    torch.testing.assert_close(pred, before)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), moved, strict=True))
    with pytest.raises(RuntimeError), reference.lent():
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), moved, strict=True))


def test_a_gradient_taken_around_a_lend_is_that_of_the_policy():
    module = network()
    reference = MovingReference(dict(module.named_parameters()), "ema", decay=0.5, every=1)
    move(module, 1.0)
    with reference.lent():
        module(torch.ones(1, 3))
    module(torch.ones(1, 3)).square().sum().backward()
    expected = 2 * module(torch.ones(1, 3)).detach()
    torch.testing.assert_close(module.bias.grad, expected[0])


def test_a_saved_reference_goes_on():
    module = network()
    reference = MovingReference(dict(module.named_parameters()), "ema", decay=0.9, every=1)
    move(module, 1.0)
    reference.after_step(0)
    other = MovingReference(dict(module.named_parameters()), "ema", decay=0.9, every=1)
    other.load_state_dict(reference.state_dict())
    assert torch.equal(other.weights["weight"], reference.weights["weight"])
    assert not torch.equal(other.weights["weight"], module.weight)
