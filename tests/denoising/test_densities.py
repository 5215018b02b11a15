"""Time densities against golden records of diffusers' training utilities, and the timesteps drawn from them."""

import math

import pytest
import torch
from scipy import stats
from torch import tensor

from diffalign import vocabulary
from diffalign.denoising import (
    DENSITIES,
    STABLE_DIFFUSION,
    DDPMPath,
    FixedList,
    FlowPath,
    LogitNormal,
    Mode,
    Shift,
    TimestepSampling,
    Uniform,
    sample_timesteps,
)
from diffalign.errors import ConfigError
from tests import golden

RECORDS = golden.load("flow")
FLOW, DDPM = FlowPath(), DDPMPath.from_config(STABLE_DIFFUSION)
IDS = torch.arange(20000)
LEVELS = [Uniform(), LogitNormal(), LogitNormal(0.5, 0.8), Mode(), Mode(-0.7)]
SAMPLINGS = [
    TimestepSampling(),
    TimestepSampling(LogitNormal()),
    TimestepSampling(LogitNormal(-0.5, 1.3), Shift(3.0)),
    TimestepSampling(Mode(), Shift(math.exp(0.54), 0.02)),
]


def records(prefix):
    return [pytest.param(record, id=name) for name, record in RECORDS.items() if name.startswith(prefix)]


def slope(function, x):
    """Return the derivative of a function of a tensor, float64."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("record", records("density_logit_normal"))
def test_logit_normal(record):
    density = LogitNormal(**record["hyperparameters"])
    draws = torch.special.ndtr(tensor(record["inputs"]["z"], dtype=torch.float64))
    golden.assert_close(record, "u", density.quantile(draws))
    points = record["inputs"]["u_points"]
    golden.assert_close(record, "cdf", [density.cdf(point) for point in points])
    below = tensor([density.cdf(point) for point in points[2:]], dtype=torch.float64)
    density_at = tensor(record["expected"]["pdf"][2:], dtype=torch.float64)
    torch.testing.assert_close(1 / slope(density.quantile, below), density_at, rtol=1e-5, atol=0)


@pytest.mark.parametrize("record", records("density_mode"))
def test_mode(record):
    density, fraction = Mode(**record["hyperparameters"]), 1 - tensor(record["inputs"]["r"], dtype=torch.float64)
    golden.assert_close(record, "u", density.quantile(fraction))
    golden.assert_close(record, "pdf_at_u", 1 / slope(density.quantile, fraction))


@pytest.mark.parametrize("density", LEVELS, ids=str)
def test_quantiles_undo_the_distribution(density):
    fractions = [1e-6, 0.01, 0.3, 0.5, 0.9, 0.9999]
    found = [density.cdf(level) for level in density.quantile(tensor(fractions, dtype=torch.float64)).tolist()]
    assert found == pytest.approx(fractions, rel=1e-9)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_timesteps_of_a_flow_follow_density_and_shift(sampling):
    timesteps = sample_timesteps(FLOW, 0, 3, IDS, sampling=sampling)
    assert timesteps.dtype == torch.float32
    assert timesteps.min() > 1000 * sampling.shift.terminal
    assert timesteps.max() <= 1000
    levels = [sampling.density.cdf(sampling.shift.inverse(t / 1000)) for t in timesteps[:2000].tolist()]
    assert stats.kstest(levels, "uniform").pvalue > 0.01
    assert len(timesteps.unique()) > 19000


def test_the_median_of_a_shifted_density_is_the_shifted_median():
    timesteps = sample_timesteps(FLOW, 0, 3, IDS, sampling=TimestepSampling(LogitNormal(), Shift(3.0)))
    assert timesteps.median() == pytest.approx(750, abs=5)  # 3 * 0.5 / (1 + 2 * 0.5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_window_holds_of_what_the_network_is_told(sampling):
    """It leaves the density within it as it is: what is drawn is what would have been drawn, given it is inside."""
    inside = sample_timesteps(FLOW, 0, 3, IDS, 600, 900, sampling)
    assert 600 <= inside.min() < 610
    assert 890 < inside.max() <= 900
    everything = sample_timesteps(FLOW, 1, 3, IDS, sampling=sampling)
    kept = everything[(everything >= 600) & (everything <= 900)]
    assert stats.ks_2samp(inside.numpy(), kept.numpy()).pvalue > 0.01


@pytest.mark.parametrize("path", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_a_list_is_drawn_as_it_is(path):
    sampling = TimestepSampling(FixedList((801, 694, 548, 338)), Shift() if path is DDPM else Shift(3.0))
    values, counts = sample_timesteps(path, 0, 3, IDS, sampling=sampling).unique(return_counts=True)
    assert values.tolist() == [338, 548, 694, 801]
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    assert set(sample_timesteps(path, 0, 3, IDS, 500, 700, sampling).tolist()) == {548, 694}


def test_ddpm_knows_densities_at_whole_timesteps():
    timesteps = sample_timesteps(DDPM, 0, 3, IDS, 100, 900, TimestepSampling(LogitNormal()))
    assert timesteps.dtype == torch.int64
    assert 100 <= timesteps.min()
    assert timesteps.max() <= 899
    assert ((timesteps >= 450) & (timesteps < 550)).float().mean() > 0.15  # 0.125 of the levels


def test_uniform_draws_of_ddpm_are_what_they_were():
    """Runs of before must go on as they began."""
    expected = [500, 807, 724, 775, 502]
    assert sample_timesteps(DDPM, 7, 3, torch.arange(5), low=500).tolist() == expected
    assert sample_timesteps(DDPM, 7, 3, torch.arange(5), 500, None, TimestepSampling()).tolist() == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_flow_timestep_depends_on_seed_step_and_id_alone(sampling):
    timesteps = sample_timesteps(FLOW, 0, 3, IDS[:200], 20, 980, sampling)
    assert torch.equal(sample_timesteps(FLOW, 0, 3, IDS[:200].flip(0), 20, 980, sampling), timesteps.flip(0))
    assert torch.equal(sample_timesteps(FLOW, 0, 3, IDS[50:60], 20, 980, sampling), timesteps[50:60])
    for seed, step in ((1, 3), (0, 4)):
        assert not (sample_timesteps(FLOW, seed, step, IDS[:200], 20, 980, sampling) == timesteps).any()


def test_the_smallest_random_number_is_a_timestep():
    fraction = torch.zeros(1, dtype=torch.float64)
    for sampling in (*SAMPLINGS, TimestepSampling(LogitNormal(0.0, 20.0))):
        timesteps = FLOW.timesteps_at(fraction, sampling=sampling)
        assert 0 < timesteps.item() < 25
        assert all(coefficient.item() > 0 for coefficient in FLOW.alpha_sigma(timesteps))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormal(std=0.0), "std > 0, got 0.0 and 0.0"),
        (lambda: Mode(2.0), "from -1 to .* got 2.0"),
        (lambda: FixedList(()), "at least one"),
        (lambda: FixedList((100.0, -1.0)), "none below 0, got"),
        (lambda: draw(FLOW, FixedList((801,)), 0, 800), "None of the timesteps .* between 0 and 800"),
        (lambda: draw(FLOW, FixedList((1001,)), 0, 1000), "None of the timesteps"),
        (lambda: draw(FLOW, Uniform(), 0, 10, Shift(1.0, 0.02)), "No timestep falls between 0 and 10 .* level 0.02"),
        (lambda: draw(FLOW, LogitNormal(-8, 0.1), 900, 1000), "No timestep falls between 900 and 1000"),
        (lambda: draw(DDPM, Uniform(), 0, 1000, Shift(3.0)), "that of DDPM, which knows no shift"),
        (lambda: draw(FLOW, Uniform(), 700, 500), "0 <= low < high <= 1000, got low 700 and high 500"),
        (lambda: draw(FLOW, Uniform(), 0, 1001), "0 <= low < high <= 1000"),
    ],
)
def test_impossible_samplings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def draw(path, density, low, high, shift=None):
    return sample_timesteps(path, 0, 0, IDS[:2], low, high, TimestepSampling(density, shift or Shift()))


def test_a_sampling_says_what_it_is():
    assert str(TimestepSampling()) == "uniform, no shift"
    assert str(TimestepSampling(LogitNormal(0.5, 0.8), Shift(3.0))) == (
        "logit_normal(mean 0.5, std 0.8), shift 3 (mu 1.099)"
    )
    assert str(TimestepSampling(Mode())) == "mode(scale 1.29), no shift"
    assert str(TimestepSampling(FixedList((801, 338)), Shift(3.0))) == "one of 801, 338"
    assert {name: str(kind((801,)) if name == "list" else kind()) for name, kind in DENSITIES.items()}.keys() == {
        "uniform", "logit_normal", "mode", "list"
    }  # fmt: skip


def test_settings_name_the_densities_there_are():
    assert tuple(DENSITIES) == vocabulary.DENSITIES
