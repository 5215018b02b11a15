"""What must hold for every objective, found by its file."""

import doctest
import importlib
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffalign.objectives import (
    ListErrors,
    Objective,
    PairErrors,
    Rewards,
    SingleErrors,
    Transitions,
    load,
    names,
    objective_class,
)
from diffalign.objectives.base import NEEDS
from diffalign.vocabulary import BACKPROPAGATIONS, NOISINGS, ROLLOUTS

EXTREMES = (0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e2, 1e4)


def optional(objective: Objective, name: str, value: Tensor) -> Tensor | None:
    """Return a field of the errors only if the objective asks for it."""
    return value if name in objective.needs else None


def statistic_of(objective: Objective) -> Tensor | None:
    """Return a given statistic for objectives that couple their examples: with it, examples are independent."""
    return torch.tensor(1e-5, dtype=torch.float64) if couples(objective) else None


def couples(objective: Objective) -> bool:
    """Tell whether an objective declares that its examples are not independent."""
    return type(objective).statistic is not Objective.statistic


def pair_errors(objective: Objective, policy: Tensor, reference: Tensor) -> PairErrors:
    """Build errors from policy and reference [2,B]: winners, losers."""
    referenced = "reference" in objective.needs
    return PairErrors(
        policy_w=policy[0],
        policy_l=policy[1],
        reference_w=reference[0] if referenced else None,
        reference_l=reference[1] if referenced else None,
        preference=optional(objective, "preference", torch.full_like(policy[0], 0.7)),
        drift_w=optional(objective, "drift", 1e-3 + 0 * policy[0]),
        drift_l=optional(objective, "drift", 1e-3 + 0 * policy[0]),
        progress=optional(objective, "progress", torch.tensor(0.25, dtype=torch.float64)),
        residual_product=optional(objective, "residual_product", torch.zeros_like(policy[0])),
        statistic=statistic_of(objective),
    )


def single_errors(objective: Objective, policy: Tensor, reference: Tensor) -> SingleErrors:
    """Build errors from policy and reference [1,B], desirable, or [2,B], desirable then undesirable."""
    desirable = None if objective.chosen_only else torch.arange(policy.numel()) < policy.shape[1]
    anchor = reference.flatten() if "reference" in objective.needs else None
    return SingleErrors(
        policy=policy.flatten(), reference=anchor, desirable=desirable, statistic=statistic_of(objective)
    )


def list_errors(objective: Objective, policy: Tensor, reference: Tensor) -> ListErrors:
    """Build lists of two from policy and reference [2,B]; with two images the order is all there is."""
    scores = torch.tensor([1.0, 0.0], dtype=policy.dtype).expand(policy.shape[1], 2)
    return ListErrors(policy=policy.T, reference=reference.T, scores=scores)


def transitions(objective: Objective, policy: Tensor, reference: Tensor) -> Transitions:
    """Build pairs of transitions from policy and reference [2,B], or 2B single ones; -error stands for log p."""
    if "advantages" in objective.needs:
        side = torch.tensor([[1.0], [-1.0]], dtype=policy.dtype).expand_as(policy)
        drift = (policy - reference).square().flatten() if "drift" in objective.needs else None
        behavior = -reference.flatten()
        return Transitions(
            log_prob_w=-policy.flatten(), behavior_log_prob=behavior, advantages=side.flatten(), drift=drift
        )
    return Transitions(
        log_prob_w=-policy[0],
        log_prob_l=-policy[1],
        reference_log_prob_w=-reference[0],
        reference_log_prob_l=-reference[1],
    )


def rewards(objective: Objective, policy: Tensor, reference: Tensor) -> Rewards:
    """Build rewards from policy [1,B]: a smaller error is a higher reward."""
    return Rewards(reward=-policy[0])


# The loss at a logit of 0, by the objective's equation; a new objective need not be entered.
AT_REFERENCE = {name: math.log(2) for name in ("dpo", "robust_dpo", "inpo", "smpo", "dcpo", "sdpo", "npo", "fdpo")}
AT_REFERENCE |= {"pnapo": math.log(2)}
AT_REFERENCE |= {"ipo": 0.25, "hinge": 1.0, "bco": 2 * math.log(2), "sppo": 0.5, "apo": 1.0, "nca": 2 * math.log(2)}
REVERSED = {"npo"}  # learns what people do not want
DETACHED = {"linear_dpo"}  # a weight without gradient makes the value another function: test_linear_dpo.py has its own
WINNER_ONLY = {"dspo"}  # the loser enters through the weight alone, whose gradient is 0 where the drift is small
BUILDERS = {
    "pair": pair_errors,
    "single": single_errors,
    "list": list_errors,
    "transition": transitions,
    "reward": rewards,
}


def images_of(objective: Objective) -> int:
    """Return how many images an example has in these tests: 2, or 1 where only winners are wanted."""
    return 1 if objective.chosen_only or objective.layout == "reward" else 2


def loss_of(objective: Objective, policy: Tensor, reference: Tensor) -> Tensor:
    """Return the unreduced loss for policy and reference [images,B]."""
    return objective.loss(BUILDERS[objective.layout](objective, policy, reference))


def typical(objective: Objective, count: int = 5) -> tuple[Tensor, Tensor]:
    """Return policy and reference errors [images,count] float64 as a training run has them, away from equality."""
    generator = torch.Generator().manual_seed(0)
    shape = (images_of(objective), count)
    reference = 0.02 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    scale = 4e-5 if "advantages" in objective.needs else 4e-4  # within the clip of PPO
    policy = reference + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return policy, reference


def name_of(objective: Objective) -> str:
    """Return the name of an objective: its file."""
    return type(objective).__module__.rsplit(".", 1)[-1]


WITH_PAIR_LOGIT = [
    name for name in names() if hasattr(objective_class(name), "logit") and objective_class(name).layout == "pair"
]


@pytest.fixture(params=names())
def objective(request):
    """Return every objective in turn, with its default hyperparameters."""
    return load(request.param)


def test_gradient_raises_winners_and_lowers_losers_at_the_reference(objective):
    _, reference = typical(objective)
    policy = reference.clone().requires_grad_()
    loss_of(objective, policy, reference).sum().backward()
    sign = -1 if name_of(objective) in REVERSED else 1
    assert (sign * policy.grad[0] > 0).all(), "a smaller error of the winner must lower the loss"
    if images_of(objective) == 2 and name_of(objective) not in WINNER_ONLY:
        assert (sign * policy.grad[1] < 0).all(), "a smaller error of the loser must raise the loss"


@pytest.mark.parametrize("objective", [name for name in names() if name not in DETACHED], indirect=True)
def test_gradient_is_the_derivative(objective):
    policy, reference = typical(objective)
    policy.requires_grad_()
    # Steps of 1e-8: beta is in the thousands, so the loss bends within 1e-4.
    assert torch.autograd.gradcheck(lambda x: loss_of(objective, x, reference), (policy,), eps=1e-8, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss_of(objective, policy, reference).sum(), policy)
    assert gradient.abs().amax() > 0.02 * min(1.0, getattr(objective, "weight", 1.0)), (
        "nothing is checked where the loss is flat"
    )


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


def test_a_statistic_is_the_only_way_examples_depend_on_each_other(objective):
    policy, reference = typical(objective)
    if not couples(objective):
        return
    errors = replace(BUILDERS[objective.layout](objective, policy, reference), statistic=None)
    statistic = objective.statistic(errors)
    assert statistic.ndim == 0
    assert not statistic.requires_grad
    given = replace(errors, statistic=statistic)
    torch.testing.assert_close(objective.loss(errors), objective.loss(given), rtol=0, atol=0)


def test_needs_and_noising_are_known(objective):
    assert objective.needs <= NEEDS
    assert objective.noising in NOISINGS
    assert objective.rollout in (BACKPROPAGATIONS if objective.layout == "reward" else ROLLOUTS)


def test_one_loss_an_example(objective):
    policy, reference = typical(objective, count=3)
    alone = objective.layout == "single" or "advantages" in objective.needs
    expected = 3 * images_of(objective) if alone else 3
    assert loss_of(objective, policy, reference).shape == (expected,)


@pytest.mark.parametrize("name", WITH_PAIR_LOGIT)
def test_logit_is_zero_at_the_reference_and_changes_sign_with_the_label(name):
    objective = load(name)
    policy, reference = typical(objective)
    logit = objective.logit(pair_errors(objective, policy, reference))
    swapped = objective.logit(pair_errors(objective, policy.flip(0), reference.flip(0)))
    torch.testing.assert_close(swapped, -logit, rtol=1e-9, atol=0)
    # dspo's beta is 0.01: its logit is small by design.
    assert logit.abs().min() > 1e-6 * min(1e3, objective.beta)

    if "reference" not in objective.needs:
        return
    at_reference = replace(pair_errors(objective, reference.float(), reference.float()), statistic=None)
    assert not objective.logit(at_reference).any()
    if name in AT_REFERENCE:
        loss = objective.loss(at_reference)
        assert torch.equal(loss, loss[:1].expand(5))
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
