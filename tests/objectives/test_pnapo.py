"""PNAPO: numbers computed by hand, and what its factors do. There is no official code to take numbers from."""

import math

import pytest
import torch
from torch import tensor

from diffalign.errors import ConfigError
from diffalign.objectives import PairErrors, entry, load

SIDES = {"policy_w": 0.10, "policy_l": 0.20, "reference_w": 0.11, "reference_l": 0.18}  # a margin of 0.03


def pair(p=0.8, progress=0.0, **changed):
    errors = {name: tensor([value], dtype=torch.float64) for name, value in {**SIDES, **changed}.items()}
    return PairErrors(
        **errors,
        preference=tensor([p], dtype=torch.float64),
        progress=None if progress is None else tensor(progress, dtype=torch.float64),
    )


# 2000 / 2 * 0.03 = 30 times 2p - 1 = 0.6 times g: 1 at the start; 1/2 + 1/4 (1 + cos) of a third, half and all of pi.
@pytest.mark.parametrize(("progress", "g"), [(0.0, 1.0), (1 / 3, 0.875), (0.5, 0.75), (2 / 3, 0.625), (1.0, 0.5)])
def test_the_logit_at_five_times_of_a_run(progress, g):
    objective = load("pnapo", beta=2000.0)
    errors = pair(progress=progress)
    assert objective.logit(errors).item() == pytest.approx(30 * 0.6 * g, rel=1e-12)
    small = load("pnapo", beta=100.0)
    assert small.loss(errors).item() == pytest.approx(math.log1p(math.exp(-1.5 * 0.6 * g)), rel=1e-12)


def test_another_end():
    objective = load("pnapo", beta=2000.0, end=0.2)
    assert objective.logit(pair(progress=0.5)).item() == pytest.approx(18 * (0.2 + 0.8 * 0.5), rel=1e-12)
    constant = load("pnapo", end=1.0)
    values = {constant.logit(pair(progress=n)).item() for n in (0.0, 0.3, 0.9)}
    assert len(values) == 1


def test_at_the_start_with_a_sure_winner_it_is_dpo():
    errors = pair(p=1.0, policy_w=0.3)
    assert load("pnapo", beta=700.0).loss(errors).item() == load("dpo", beta=700.0).loss(errors).item()


def test_with_gamma_10_at_the_start_it_is_smpo():
    errors = pair(p=0.55)
    assert load("pnapo", beta=700.0, gamma=10.0).loss(errors) == load("smpo", beta=700.0).loss(errors)


def test_the_strength_falls_from_1_to_its_end_slowest_at_both_ends():
    g = load("pnapo").strength(torch.linspace(0, 1, 101, dtype=torch.float64))
    steps = g.diff()
    assert (g[0].item(), g[-1].item()) == (1.0, pytest.approx(0.5, abs=1e-15))
    assert (steps < 0).all()
    assert steps.argmin().item() in (49, 50)
    torch.testing.assert_close(g + g.flip(0), torch.full_like(g, 1.5))


def test_pairs_of_equal_reward_teach_nothing_and_contradicted_ones_the_other_way():
    for p, sign in ((0.5, 0), (0.7, 1), (0.3, -1)):
        errors = pair(p=p, progress=0.4)
        errors.policy_l.requires_grad_()
        load("pnapo").loss(errors).sum().backward()
        assert -errors.policy_l.grad.sign().item() == sign


def test_it_says_what_it_needs():
    known = entry("pnapo")
    assert (known.noising, known.layout) == ("generating", "pair")
    assert known.needs == {"reference", "preference", "progress"}
    assert {key: it.default for key, it in known.hyperparameters.items()} == {"beta": 5000.0, "gamma": 1.0, "end": 0.5}
    with pytest.raises(ConfigError, match="end"):
        load("pnapo", end=0.0)
    with pytest.raises(AssertionError, match="progress"):
        load("pnapo").loss(pair(progress=None))
    with pytest.raises(ConfigError, match=r"P\(winner preferred\) of every pair"):
        load("pnapo").loss(PairErrors(**{name: tensor([x]) for name, x in SIDES.items()}, progress=tensor(0.0)))
