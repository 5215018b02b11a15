"""Plackett-Luce: the formula in float64, and what must hold of the likelihood of a ranking."""

import itertools

import pytest
import torch
from torch import tensor

from diffalign.objectives import ListErrors, PairErrors, load
from tests import golden

RECORDS = {name: it for name, it in golden.load("objectives-2026").items() if name.startswith("plackett_luce_")}
POLICY, REFERENCE = [0.10, 0.12, 0.31, 0.20], [0.11, 0.12, 0.30, 0.20]


def test_the_records_are_there():
    assert len(RECORDS) == 6


@pytest.mark.parametrize("name", RECORDS)
def test_loss_and_gradient_of_lists_sorted_best_first(name):
    record = RECORDS[name]
    policy, reference = tensor(record["inputs"]["m"], requires_grad=True), tensor(record["inputs"]["r"])
    scores = -torch.arange(policy.shape[1]).float().expand_as(policy)
    loss = load("plackett_luce", **record["hyperparameters"]).loss(
        ListErrors(policy=policy, reference=reference, scores=scores)
    )
    loss.mean().backward()
    golden.assert_close(record, "per_example_loss", loss)
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_m", policy.grad)


def ranked(scores, policy=None):
    policy = tensor([POLICY]) if policy is None else policy
    return ListErrors(policy=policy, reference=tensor([REFERENCE]), scores=tensor([scores]))


@pytest.mark.parametrize("winner", [0, 1])
def test_two_images_are_dpo(winner):
    leaves = [tensor([[0.10, 0.20]], requires_grad=True) for _ in range(2)]
    reference, scores = tensor([[0.11, 0.18]]), torch.nn.functional.one_hot(tensor([winner]), 2).float()
    loss = load("plackett_luce", beta=100.0).loss(ListErrors(policy=leaves[0], reference=reference, scores=scores))
    pair = PairErrors(
        policy_w=leaves[1][:, winner], policy_l=leaves[1][:, 1 - winner],
        reference_w=reference[:, winner], reference_l=reference[:, 1 - winner],
    )  # fmt: skip
    same = load("dpo", beta=100.0).loss(pair)
    torch.testing.assert_close(loss, same)
    for value in (loss, same):
        value.sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.abs().min() > 1


def test_the_likelihoods_of_all_orders_sum_to_one():
    objective = load("plackett_luce", beta=100.0)
    losses = [objective.loss(ranked(order)) for order in itertools.permutations([0.0, 1.0, 2.0, 3.0])]
    assert torch.cat(losses).neg().exp().sum().item() == pytest.approx(1, rel=1e-5)
    assert torch.cat(losses).std() > 0.1


def test_only_the_order_of_the_scores_is_read():
    objective = load("plackett_luce", beta=100.0)
    assert objective.loss(ranked([9.0, 0.2, -7.0, 0.1])).equal(objective.loss(ranked([4.0, 3.0, 1.0, 2.0])))
    assert not objective.loss(ranked([1.0, 3.0, 4.0, 2.0])).isclose(objective.loss(ranked([4.0, 3.0, 1.0, 2.0])))


def test_equal_scores_do_not_compete():
    policy = tensor([POLICY], requires_grad=True)
    loss = load("plackett_luce").loss(ranked([0.5, 0.5, 0.5, 0.5], policy))
    loss.sum().backward()
    assert not loss.any()
    assert not policy.grad.any()
    # Two winners that are tied: each against the two below it, and these against each other.
    tied, objective = ranked([2.0, 2.0, 1.0, 0.0]), load("plackett_luce", beta=100.0)
    g = 50 * (tied.reference - tied.policy)[0].double()
    expected = sum(g[[i, 2, 3]].logsumexp(0) - g[i] for i in (0, 1)) + g[[2, 3]].logsumexp(0) - g[2]
    assert objective.loss(tied).item() == pytest.approx(expected.item(), rel=1e-5)
