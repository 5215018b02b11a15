import sys

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import Adafactor

from diffalign.errors import ConfigError
from diffalign.training import optimizer
from diffalign.training.settings import OptimizerSettings

STEPS, WARMUP = 12, 4


def diffusers_factors(name: str, steps: int) -> list[float]:
    """Return the factors of diffusers' scheduler for steps 0 .. steps - 1."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, dummy, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    factors = []
    for _ in range(steps):
        factors.append(schedule.get_last_lr()[0])
        dummy.step()
        schedule.step()
    return factors


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_diffusers_but_move_at_the_first_step(name):
    settings = OptimizerSettings(lr_scheduler=name, lr_warmup_steps=WARMUP)
    got = [optimizer.learning_rate_factor(settings, step, STEPS) for step in range(STEPS)]
    expected = diffusers_factors(name, STEPS)
    assert got[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-12)
    if name == "constant":
        assert got == [1.0] * STEPS
    else:
        # The one deviation: diffusers' first step of a warm-up has factor 0 and does nothing.
        assert expected[:WARMUP] == [0.0, 0.25, 0.5, 0.75]
        assert got[:WARMUP] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decays_start_at_the_peak_and_end_near_zero(name):
    settings = OptimizerSettings(lr_scheduler=name)
    factors = [optimizer.learning_rate_factor(settings, step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1.0
    assert 0 < factors[99] < 0.011
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


def test_scale_lr_multiplies_by_the_global_batch():
    scaled = OptimizerSettings(learning_rate=1e-8, scale_lr=True)
    assert optimizer.peak_learning_rate(scaled, 2048) == pytest.approx(2.048e-5)
    assert optimizer.peak_learning_rate(scaled.model_copy(update={"scale_lr": False}), 2048) == 1e-8


def test_adamw_takes_every_setting():
    settings = OptimizerSettings(
        learning_rate=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.2, adam_epsilon=1e-3
    )
    group = optimizer.build([nn.Parameter(torch.ones(3))], settings).param_groups[0]
    taken = {key: group[key] for key in ("lr", "betas", "weight_decay", "eps")}
    assert taken == {"lr": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.2, "eps": 1e-3}


def test_adafactor_moves_by_the_rate_it_is_given():
    weight = nn.Parameter(torch.ones(4, 4))
    built = optimizer.build([weight], OptimizerSettings(name="adafactor", learning_rate=0.5, adam_weight_decay=0.0))
    assert isinstance(built, Adafactor)
    moved = []
    for rate in (0.0, 1e-3, 2e-3):
        before = weight.detach().clone()
        built.param_groups[0]["lr"] = rate
        weight.grad = torch.ones(4, 4)
        built.step()
        moved.append((before - weight.detach()).mean().item())
    assert moved[0] == 0
    assert moved[1] > 0
    assert moved[2] == pytest.approx(2 * moved[1], rel=1e-3)


def test_8_bit_adam_without_bitsandbytes_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r'"adamw_8bit" needs bitsandbytes: pip install .* or use "adamw"'):
        optimizer.build([nn.Parameter(torch.ones(1))], OptimizerSettings(name="adamw_8bit"))
