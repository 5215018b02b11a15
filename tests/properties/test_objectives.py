"""What must hold for every objective, found by its file."""

import doctest
import importlib
import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from diffalign.objectives import Objective, PairErrors, SingleErrors, load, names, objective_class

EXTREMES = (0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e2, 1e4)


def pair_errors(objective: Objective, policy: Tensor, reference: Tensor) -> PairErrors:
    """Build errors from policy and reference [2,B]: winners, losers."""
    if "reference" not in objective.needs:
        return PairErrors(policy_w=policy[0], policy_l=policy[1])
    return PairErrors(policy_w=policy[0], policy_l=policy[1], reference_w=reference[0], reference_l=reference[1])


def single_errors(objective: Objective, policy: Tensor, reference: Tensor) -> SingleErrors:
    """Build errors from policy and reference [1,B], desirable, or [2,B], desirable then undesirable."""
    desirable = None if objective.chosen_only else torch.arange(policy.numel()) < policy.shape[1]
    anchor = reference.flatten() if "reference" in objective.needs else None
    return SingleErrors(policy=policy.flatten(), reference=anchor, desirable=desirable)


# The loss at a logit of 0, by the objective's equation; a new objective need not be entered.
AT_REFERENCE = {"dpo": math.log(2), "robust_dpo": math.log(2), "ipo": 0.25, "hinge": 1.0}
BUILDERS = {"pair": pair_errors, "single": single_errors}


def images_of(objective: Objective) -> int:
    """Return how many images an example has in these tests: 2, or 1 where only winners are wanted."""
    return 1 if objective.chosen_only else 2


def loss_of(objective: Objective, policy: Tensor, reference: Tensor) -> Tensor:
    """Return the unreduced loss for policy and reference [images,B]."""
    return objective.loss(BUILDERS[objective.layout](objective, policy, reference))


def typical(objective: Objective, count: int = 5) -> tuple[Tensor, Tensor]:
    """Return policy and reference errors [images,count] float64 as a training run has them, away from equality."""
    generator = torch.Generator().manual_seed(0)
    shape = (images_of(objective), count)
    reference = 0.02 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    policy = reference + 4e-4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return policy, reference


@pytest.fixture(params=names())
def objective(request):
    """Return every objective in turn, with its default hyperparameters."""
    return load(request.param)


def test_gradient_raises_winners_and_lowers_losers_at_the_reference(objective):
    _, reference = typical(objective)
    policy = reference.clone().requires_grad_()
    loss_of(objective, policy, reference).sum().backward()
    assert (policy.grad[0] > 0).all(), "a smaller error of the winner must lower the loss"
    if not objective.chosen_only:
        assert (policy.grad[1] < 0).all(), "a smaller error of the loser must raise the loss"


def test_gradient_is_the_derivative(objective):
    policy, reference = typical(objective)
    policy.requires_grad_()
    # Steps of 1e-8: beta is in the thousands, so the loss bends within 1e-4.
    assert torch.autograd.gradcheck(lambda x: loss_of(objective, x, reference), (policy,), eps=1e-8, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss_of(objective, policy, reference).sum(), policy)
    assert gradient.abs().amax() > 0.1, "nothing is checked where the loss is flat"


def test_value_and_gradient_are_finite_at_the_extremes(objective):
    images = images_of(objective)
    grid = torch.tensor(list(itertools.product(EXTREMES, repeat=2 * images))).T
    policy, reference = grid[:images].clone().requires_grad_(), grid[images:]
    loss = loss_of(objective, policy, reference)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()
    assert policy.grad.any()


def test_examples_are_independent(objective):
    policy, reference = typical(objective)
    together = loss_of(objective, policy, reference).reshape(-1, policy.shape[1])
    alone = [loss_of(objective, policy[:, [i]], reference[:, [i]]).reshape(-1, 1) for i in range(policy.shape[1])]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=0)
    assert len(together.unique()) == together.numel()


def test_one_loss_an_example(objective):
    policy, reference = typical(objective, count=3)
    expected = 3 if objective.layout == "pair" else 3 * images_of(objective)
    assert loss_of(objective, policy, reference).shape == (expected,)


@pytest.mark.parametrize("name", [name for name in names() if hasattr(objective_class(name), "logit")])
def test_logit_is_zero_at_the_reference_and_changes_sign_with_the_label(name):
    objective = load(name)
    policy, reference = typical(objective)
    logit = objective.logit(pair_errors(objective, policy, reference))
    swapped = objective.logit(pair_errors(objective, policy.flip(0), reference.flip(0)))
    torch.testing.assert_close(swapped, -logit, rtol=1e-12, atol=0)
    assert logit.abs().min() > 1e-3

    if "reference" not in objective.needs:
        return
    at_reference = pair_errors(objective, reference.float(), reference.float())
    assert not objective.logit(at_reference).any()
    loss = objective.loss(at_reference)
    assert torch.equal(loss, loss[:1].expand(5))
    if name in AT_REFERENCE:
        torch.testing.assert_close(loss[0].item(), AT_REFERENCE[name], rtol=1e-7, atol=0)


def test_hyperparameters_are_immutable_and_complete(objective):
    assert load(type(objective).__module__.rsplit(".", 1)[-1], **vars(objective)) == objective
    for key in vars(objective):
        with pytest.raises(AttributeError):
            setattr(objective, key, 1.0)


@pytest.mark.parametrize("name", names())
def test_docstring_cites_a_paper_and_its_example_runs(name):
    module = importlib.import_module(f"diffalign.objectives.{name}")
    assert re.search(r"\b\d{4}\.\d{5}\b", module.__doc__), "the module docstring must name the paper by its arXiv id"
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
