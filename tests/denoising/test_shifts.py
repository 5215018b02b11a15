"""Shifts against golden records of diffusers' schedulers and pipelines, and what training makes of a config."""

import math

import pytest
import torch
from torch import tensor

from diffalign.denoising import Shift, flux2_mu, mu_by_tokens, shift_of, shifted, stretched
from diffalign.errors import ConfigError
from tests import golden

RECORDS = golden.load("flow")
FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def records(*prefixes):
    return [pytest.param(record, id=name) for name, record in RECORDS.items() if name.startswith(prefixes)]


def levels(record):
    return tensor(record["inputs"]["s"], dtype=torch.float64)


@pytest.mark.parametrize("record", records("shift_static"))
def test_static(record):
    golden.assert_close(record, "s_shifted", shifted(levels(record), record["hyperparameters"]["shift"]))


@pytest.mark.parametrize("record", records("shift_dynamic"))
def test_dynamic(record):
    mu = record["hyperparameters"]["mu"]
    golden.assert_close(record, "exponential", shifted(levels(record), math.exp(mu)))
    golden.assert_close(record, "linear", shifted(levels(record), mu))


@pytest.mark.parametrize("record", records("mu_by_tokens"))
def test_mu_by_tokens(record):
    given = record["hyperparameters"]
    golden.assert_close(record, "mu", [mu_by_tokens(tokens, **given) for tokens in record["inputs"]["tokens"]])


def test_mu_of_lumina2_is_that_of_its_channels():
    record = RECORDS["mu_lumina2_channels"]
    golden.assert_close(record, "mu", mu_by_tokens(record["inputs"]["channels"]))


def test_mu_of_flux2():
    record = RECORDS["mu_flux2_empirical"]
    rows = [[flux2_mu(tokens, steps) for steps in record["inputs"]["steps"]] for tokens in record["inputs"]["tokens"]]
    golden.assert_close(record, "mu", rows)


@pytest.mark.parametrize("record", records("ladder_flux", "ladder_qwen", "ladder_zimage", "ladder_lumina2"))
def test_ladders_of_samplers(record):
    """What a pipeline samples with, from the scheduler config and the picture alone."""
    given = record["hyperparameters"]
    steps, config = given["steps"], given["scheduler"]
    rule = "flux2" if record["id"].startswith("ladder_flux2") else "tokens"
    shift = shift_of(config, given.get("tokens"), mu_rule=rule, num_steps=steps)
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    moved = shifted(even, shift.factor)
    if shift.terminal:
        moved = stretched(moved, shift.terminal, last=moved[-1].item())
    golden.assert_close(record, "sigmas", torch.cat([moved, moved.new_zeros(1)]))
    golden.assert_close(record, "timesteps", 1000 * moved)
    if "mu" in record["expected"]:
        golden.assert_close(record, "mu", shift.mu)


@pytest.mark.parametrize("record", records("ladder_sd3"))
def test_the_ladder_of_sd3_shifts_its_ends_twice(record):
    shift, steps = shift_of(record["hyperparameters"]["scheduler"]), record["hyperparameters"]["steps"]
    even = torch.linspace(1, shift(1 / 1000), steps, dtype=torch.float64)
    golden.assert_close(record, "timesteps", 1000 * shift(even))


@pytest.mark.parametrize("record", records("train_index"))
def test_levels_that_diffusers_scripts_train_at(record):
    """Their u counts from noise to data; with dynamic shifting they do not shift at all."""
    config, u = record["hyperparameters"]["scheduler"], tensor(record["inputs"]["u"], dtype=torch.float64)
    shift = Shift() if config.get("use_dynamic_shifting") else shift_of(config)
    golden.assert_close(record, "sigma", shift(1 - (1000 * u).floor() / 1000))


@pytest.mark.parametrize("shift", [Shift(), Shift(3.0), Shift(0.4), Shift(math.exp(0.9), 0.02)])
def test_a_shift_is_undone_by_its_inverse(shift):
    points = [0.001, 0.03, 0.5, 0.97, 1.0]
    assert [shift.inverse(shift(point)) for point in points] == pytest.approx(points, rel=1e-9)
    assert shift(1.0) == 1
    assert shift(0.0) == pytest.approx(shift.terminal, abs=1e-12)
    assert shift.inverse(0.0) == 0
    assert shift.inverse(shift.terminal / 2) == 0  # nothing goes there


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({}, {}, Shift()),
        ({"shift": 3.0}, {}, Shift(3.0)),
        ({"shift": 3.0, "use_dynamic_shifting": False}, {"tokens": 4096}, Shift(3.0)),
        ({"flow_shift": 3.0, "use_flow_sigmas": True}, {}, Shift(3.0)),
        (FLUX, {"tokens": 256}, Shift(math.exp(0.5))),
        (FLUX | {"time_shift_type": "linear"}, {"tokens": 256}, Shift(0.5)),
        (FLUX, {"tokens": 4301, "mu_rule": "flux2"}, Shift(math.exp(0.00016927 * 4301 + 0.45666666))),
        (FLUX | {"shift_terminal": 0.02}, {"tokens": 256}, Shift(math.exp(0.5), 0.02)),
        (FLUX | {"shift_terminal": None}, {"tokens": 256}, Shift(math.exp(0.5))),
    ],
)
def test_the_shift_of_a_config(config, given, expected):
    shift = shift_of(config, **given)
    assert (shift.factor, shift.terminal) == pytest.approx((expected.factor, expected.terminal))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shift_of(FLUX), "number of image tokens is needed"),
        (
            lambda: shift_of(FLUX | {"time_shift_type": "exponentail"}, 256),
            '"exponentail" .*Did you mean',
        ),
        (lambda: shift_of({"shift": 0.0}), "factor > 0.* got 0.0"),
        (lambda: Shift(2.0, 1.0), "terminal level in .* got 2.0 and 1.0"),
        (lambda: Shift(float("nan")), "factor > 0"),
    ],
)
def test_impossible_shifts_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_shift_says_what_it_does():
    assert str(Shift()) == "no shift"
    assert str(Shift(3.0)) == "shift 3 (mu 1.099)"
    assert str(Shift(3.0, 0.02)) == "shift 3 (mu 1.099), from level 0.02 on"
