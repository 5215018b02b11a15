"""RankDPO: both readings of the discount, and what must hold of a ranking loss."""

import pytest
import torch
from torch import tensor

from diffalign.objectives import ListErrors, PairErrors, load
from tests import golden
from tests.objectives.records import RECORDS


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("rankdpo_")])
def test_loss_weights_and_gradient(name):
    record = RECORDS[name]
    given = record["hyperparameters"]
    objective = load("rankdpo", beta=given["beta"], discount=given["discount"])
    lost, phi = tensor(record["inputs"]["s"], requires_grad=True), tensor(record["inputs"]["phi"])
    loss = objective.loss(ListErrors(policy=lost + 0.1, reference=torch.full_like(phi, 0.1), scores=phi))
    loss.mean().backward()
    golden.assert_close(record, "delta", objective.weights(phi))
    golden.assert_close(record, "per_list_loss", loss)
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_s", lost.grad)


def errors(order=slice(None)):
    policy = tensor([[0.10, 0.12, 0.31, 0.2], [0.2, 0.1, 0.05, 0.4]])
    reference = tensor([[0.11, 0.12, 0.30, 0.2], [0.21, 0.1, 0.06, 0.39]])
    scores = tensor([[1.0, 0.2, 0.6, 0.4], [0.1, 0.9, 0.3, 0.0]])
    return ListErrors(policy=policy[:, order], reference=reference[:, order], scores=scores[:, order])


@pytest.mark.parametrize("discount", ["inverse", "plain"])
def test_the_order_of_the_images_does_not_matter(discount):
    objective = load("rankdpo", beta=100.0, discount=discount)
    torch.testing.assert_close(objective.loss(errors([2, 0, 3, 1])), objective.loss(errors()), rtol=1e-6, atol=0)
    assert objective.loss(errors()).min() > 0.1


def test_equal_scores_teach_nothing():
    policy = tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    same = ListErrors(policy=policy, reference=tensor([[0.2, 0.1, 0.3]]), scores=tensor([[0.5, 0.5, 0.5]]))
    loss = load("rankdpo").loss(same)
    loss.sum().backward()
    assert not loss.any()
    assert not policy.grad.any()


def test_two_images_are_dpo_up_to_the_weight():
    pair = PairErrors(
        policy_w=tensor([0.10]), policy_l=tensor([0.20]), reference_w=tensor([0.11]), reference_l=tensor([0.18])
    )
    ranked = ListErrors(policy=tensor([[0.20, 0.10]]), reference=tensor([[0.18, 0.11]]), scores=tensor([[0.0, 1.0]]))
    objective = load("rankdpo", beta=100.0)
    weight = objective.weights(ranked.scores).sum()
    torch.testing.assert_close(objective.loss(ranked), weight * load("dpo", beta=100.0).loss(pair))
