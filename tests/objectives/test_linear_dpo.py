"""Linear-DPO: numbers of the authors' code, and what its detached weight means."""

import pytest
import torch
from torch import tensor

from diffalign.objectives import PairErrors, load
from tests import golden
from tests.objectives.records import assert_loss_and_gradients, golden_errors

RECORDS = {name: it for name, it in golden.load("objectives-2026").items() if name.startswith("linear_dpo_")}


def test_the_records_are_there():
    assert len(RECORDS) == 3


@pytest.mark.parametrize("name", RECORDS)
def test_loss_weight_and_gradients(name):
    record = RECORDS[name]
    objective = load("linear_dpo", **record["hyperparameters"])
    golden.assert_close(record, "weight", objective.weight(golden_errors(record)[0]))
    assert_loss_and_gradients(record, objective)


def pair(policy, gap=0.02):
    """Return pairs whose reference has the errors 0.1 and 0.1 + gap."""
    base = torch.zeros_like(policy) + 0.1
    return PairErrors(policy_w=policy, policy_l=base + gap, reference_w=base, reference_l=base + gap)


def test_the_gradient_is_that_of_a_parabola_between_two_lines():
    # The weight is its derivative in d; beyond the bends, where the weight is eta or 1 - eta, it goes on straight.
    beta, eta = 100.0, 0.05
    policy = torch.linspace(0.02, 0.18, 41, dtype=torch.float64, requires_grad=True)
    d = policy - 0.1
    bend = (0.5 - eta) / (0.2 * beta)
    inside = d.clamp(-bend, bend)
    weight_there = 0.2 * beta * inside + 0.5
    potential = 0.1 * beta * inside**2 + 0.5 * inside + weight_there.detach() * (d - inside)
    (expected,) = torch.autograd.grad(potential.sum(), policy)
    (got,) = torch.autograd.grad(load("linear_dpo", beta=beta, eta=eta).loss(pair(policy)).sum(), policy)
    torch.testing.assert_close(got, expected)
    assert (got.min(), got.max()) == (eta, 1 - eta)
    assert len(got.unique()) > 10


def test_a_fitted_pair_rests_only_without_eta():
    for eta, expected in ((0.0, 0.0), (1e-3, 1e-3)):
        policy = tensor([0.05], requires_grad=True)
        load("linear_dpo", eta=eta).loss(pair(policy)).sum().backward()
        assert policy.grad.item() == pytest.approx(expected)


def test_the_weight_at_the_reference_does_not_depend_on_beta():
    for beta in (1.0, 5000.0):
        assert load("linear_dpo", beta=beta).weight(pair(tensor([0.1]))).item() == 0.5
