"""The flow path against golden records and diffusers, at the ends of its line, and what tells it from DDPM's."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import tensor

from diffalign.denoising import (
    STABLE_DIFFUSION,
    DDPMPath,
    FlowPath,
    add_noise,
    min_snr,
    normal,
    path_of,
    target,
    to_epsilon,
    to_x0,
)
from diffalign.errors import ConfigError
from tests import golden

ROOT = Path(__file__).parents[2]
RECORDS = golden.load("flow")
PATH = FlowPath()
STEPS = [pytest.param(record, id=name) for name, record in RECORDS.items() if name.startswith("path_step_")]


def mean_square(difference):
    return difference.square().flatten(1).mean(1)


@pytest.mark.parametrize("record", STEPS)
def test_the_path_and_what_follows_from_a_velocity(record):
    x0, noise, pred = (tensor(record["inputs"][key]) for key in ("x0", "noise", "v_pred"))
    timesteps = torch.full((2,), record["expected"]["timestep"])
    xt, wanted = add_noise(PATH, x0, noise, timesteps), target(PATH, x0, noise, timesteps)
    clean, drawn = to_x0(PATH, xt, pred, timesteps), to_epsilon(PATH, xt, pred, timesteps)
    golden.assert_close(record, "sigma", PATH.alpha_sigma(timesteps)[1][0])
    for key, got in (("x_s", xt), ("target", wanted), ("x0_hat", clean), ("noise_hat", drawn)):
        golden.assert_close(record, key, got)
    errors = {"error_v": pred - wanted, "error_x0": clean - x0, "error_noise": drawn - noise}
    for key, difference in errors.items():
        golden.assert_close(record, key, mean_square(difference))


@pytest.mark.parametrize("record", STEPS)
def test_a_step_of_the_ode_is_eulers(record):
    x, pred = tensor(record["expected"]["x_s"]), tensor(record["inputs"]["v_pred"])
    source, destination = (tensor(record["expected"][key]) for key in ("sigma", "sigma_next"))
    golden.assert_close(record, "x_prev", PATH.ode_step(x, PATH.ode_direction(x, pred, source), source, destination))
    # Euler's step is DDIM's with other coefficients: the implied x0 and noise, mixed anew.
    timesteps = torch.full((2,), 1000 * source.item())
    clean, noise = PATH.to_x0(x, pred, timesteps), PATH.to_epsilon(x, pred, timesteps)
    golden.assert_close(record, "x_prev", (1 - destination) * clean + destination * noise)


def test_noising_agrees_with_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[[0, 3, 500, 998, 999]]
    x0, noise = normal(0, 0, torch.arange(10), (4, 8, 8)).chunk(2)
    theirs = scheduler.scale_noise(x0, timesteps, noise)
    torch.testing.assert_close(add_noise(PATH, x0, noise, timesteps), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(target(PATH, x0, noise, timesteps), noise - x0)  # of the scripts that fine-tune flow models


def test_both_ends_of_the_line_keep_their_digits():
    timesteps = tensor([1e-3, 0.37, 20.0, 500.0, 980.0, 999.9, 999.99994, 1000.0])
    alpha, sigma = PATH.alpha_sigma(timesteps)
    assert alpha.dtype == sigma.dtype == torch.float32
    exact = timesteps.double() / 1000
    torch.testing.assert_close(sigma.double(), exact, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(alpha.double(), (1000 - timesteps.double()) / 1000, rtol=1.2e-7, atol=0)
    rounded_first = (1 - exact.float()).double()
    assert ((rounded_first - (1 - exact)).abs() / (1 - exact))[-2] > 1e-3  # what the other order would lose


def test_x0_and_noise_survive_the_round_trip_at_any_level():
    timesteps = tensor([1e-3, 20.0, 500.0, 980.0, 999.99994, 1000.0])
    x0, noise = normal(1, 0, torch.arange(12), (4, 8, 8)).chunk(2)
    xt, wanted = add_noise(PATH, x0, noise, timesteps), target(PATH, x0, noise, timesteps)
    torch.testing.assert_close(to_x0(PATH, xt, wanted, timesteps), x0, rtol=0, atol=2e-6)
    torch.testing.assert_close(to_epsilon(PATH, xt, wanted, timesteps), noise, rtol=0, atol=2e-6)
    assert torch.equal(xt[-1], noise[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_of_any_precision_are_noised_in_float32(dtype):
    x0, noise = normal(2, 0, torch.arange(6), (4, 8, 8)).to(dtype).chunk(2)
    timesteps = tensor([1.0, 500.0, 998.0])
    for function in (add_noise, target, to_x0, to_epsilon):
        low = function(PATH, x0, noise, timesteps)
        assert low.dtype == torch.float32
        assert torch.equal(low, function(PATH, x0.float(), noise.float(), timesteps))


@pytest.mark.parametrize("record", STEPS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_counts_an_x0_error_clipped_at_gamma(record, gamma):
    timestep = record["expected"]["timestep"]
    weight = min_snr(PATH, tensor([timestep]), gamma).double()
    snr = (1 - timestep / 1000) ** 2 / (timestep / 1000) ** 2
    of_x0 = min(snr, gamma) * tensor(record["expected"]["error_x0"], dtype=torch.float64)
    torch.testing.assert_close(weight * tensor(record["expected"]["error_v"]), of_x0, rtol=1e-5, atol=0)
    assert min_snr(PATH, tensor([1000.0]), gamma) == 0
    assert min_snr(PATH, tensor([1e-3]), gamma).isfinite()


def test_min_snr_that_never_clips_is_the_level_dependent_beta_of_flow_dpo():
    levels = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(min_snr(PATH, 1000 * levels, 1e9), (1 - levels) ** 2)


FLOW = {
    "SD3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "Euler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config,
    "Heun": FlowMatchHeunDiscreteScheduler().config,
    "SANA": DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    ).config,
}
DDPM = {
    "nothing said": {},
    "Stable Diffusion": STABLE_DIFFUSION,
    "DDIM": DDIMScheduler(prediction_type="v_prediction").config,
    "Euler": EulerDiscreteScheduler().config,
    "DPM-Solver": DPMSolverMultistepScheduler().config,
}


@pytest.mark.parametrize("name", FLOW)
def test_configs_of_flow_matching_are_recognised(name):
    path = path_of(FLOW[name])
    assert isinstance(path, FlowPath)
    assert (path.num_train_timesteps, path.prediction_type) == (1000, "flow_prediction")


@pytest.mark.parametrize("name", DDPM)
def test_configs_of_ddpm_are_recognised(name):
    path = path_of(DDPM[name])
    assert isinstance(path, DDPMPath)
    assert torch.equal(path.alphas_cumprod, DDPMPath.from_config(DDPM[name]).alphas_cumprod)


def test_caches_of_other_paths_have_other_names():
    paths = [PATH, *map(DDPMPath.from_config, (STABLE_DIFFUSION, {}, STABLE_DIFFUSION | {"beta_end": 0.02}))]
    assert len({path.identity() for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps 500.* from 0 to 1000"),
        ({"invert_sigmas": True}, "invert_sigmas.*counts from noise to data"),
        ({"use_flow_sigmas": True, "prediction_type": "epsilon"}, 'prediction_type "epsilon".* Supported: flow_pred'),
        ({"sigma_data": 0.5}, "sigma_data says .* EDM"),
    ],
)
def test_unsupported_paths_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        path_of({"shift": 1.0, **config})


def test_nobody_else_asks_which_path_it_is():
    """The files of paths know; the backbones read and write the word for files."""
    asks = re.compile(r"isinstance\([^)]*(?:DDPM|Flow)Path|path\.prediction_type\s*[=!]=|\.alphas_cumprod")
    knowing = {"ddpm_path.py", "flow_path.py"}
    others = [
        file
        for layer in ("objectives", "denoising", "data", "rollout", "training", "jobs")
        for file in (ROOT / "diffalign" / layer).rglob("*.py")
        if file.name not in knowing
    ]
    assert len(others) > 100
    assert [file.name for file in others if asks.search(file.read_text(encoding="utf-8"))] == []
