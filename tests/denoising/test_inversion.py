"""Inversion: the authors' rule and the exact one against goldens, and what must hold of any."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, tensor

from diffalign.denoising import DDPMPath, FrozenDenoiser, Inversion, invert, inverted, normal
from diffalign.denoising.inversion import plan
from diffalign.errors import ConfigError
from tests import golden
from tests.denoising.conftest import Prompts, predict

RECORDS = golden.load("denoising")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATH = DDPMPath.from_config(SD)
EXACT = Inversion()


class NoPrompts:
    def select(self, rows):
        return self


def golden_x0():
    return torch.sin(0.05 * torch.arange(512, dtype=torch.float64)).view(2, 4, 8, 8).float()


def formula(xt, timesteps, cond):
    """Stand in for a network: the formula of the goldens."""
    return 0.2 * xt + 0.05 * torch.sin(0.01 * timesteps.double()).view(-1, 1, 1, 1).float()


def target_of(x0, xt, t):
    alpha, sigma = PATH.alpha_sigma(tensor([t]))
    return (xt - alpha * x0) / sigma


def assert_record(record, xt, x0, t):
    where = record["expected"]["probe_flat_indices"]
    for key, latent in (("x_t", xt), ("target", target_of(x0, xt, t))):
        golden.assert_close(record, f"{key}_mean", latent.mean())
        golden.assert_close(record, f"{key}_std_unbiased", latent.std())
        golden.assert_close(record, f"{key}_probe", latent.flatten()[where])


def named(*prefixes):
    return [name for name in RECORDS if name.startswith(prefixes)]


@pytest.mark.parametrize("name", named("inversion_inpo_n", "inversion_smpo_n"))
def test_authors_rule(name):
    record = RECORDS[name]
    t, iterations = record["inputs"]["t0"], int("smpo" in name)
    how = Inversion(num_steps=record["inputs"]["n"], mode="official_compat", renoise_iterations=iterations)
    fed = []

    def network(xt, timesteps, cond):
        fed.append(timesteps.unique().tolist())
        return formula(xt, timesteps, cond)

    xt = invert(PATH, golden_x0(), tensor([t, t]), network, NoPrompts(), how)
    assert_record(record, xt, golden_x0(), t)
    assert fed == [[used] for used in record["expected"]["timesteps_used"] for _ in range(1 + iterations)]
    assert plan(PATH, tensor([t]), how).destinations[0, -1] == record["expected"]["final_level"]


@pytest.mark.parametrize("name", named("inversion_inpo_eta"))
def test_authors_fresh_noise(name):
    record = RECORDS[name]
    t = record["inputs"]["t0"]

    def wave(step):
        return torch.sin(0.9 * (torch.arange(512, dtype=torch.float64) + 1) + step).float().view(2, 4, 8, 8)

    how = Inversion(mode="official_compat", eta=0.1)
    xt = invert(PATH, golden_x0(), tensor([t, t]), formula, NoPrompts(), how, wave)
    assert_record(record, xt, golden_x0(), t)


@pytest.mark.parametrize("name", named("inversion_exact_"))
def test_exact_rule(name):
    record = RECORDS[name]
    t, how = record["inputs"]["t0"], Inversion(num_steps=record["inputs"]["n"], grid="proportional")
    xt = invert(PATH, golden_x0(), tensor([t, t]), formula, NoPrompts(), how)
    assert_record(record, xt, golden_x0(), t)
    hops = plan(PATH, tensor([t]), how)
    assert [0, *hops.destinations[0].tolist()] == sorted(set(record["expected"]["levels"]))


@pytest.mark.parametrize("name", named("level_mismatch"))
def test_how_far_the_authors_rule_ends_from_its_timestep(name):
    record = RECORDS[name]
    how = Inversion(num_steps=record["inputs"]["n"], mode="official_compat")
    timesteps = tensor(record["inputs"]["t0"])
    hops = plan(PATH, timesteps, how)
    ends = hops.destinations[torch.arange(len(timesteps)), hops.count - 1]
    golden.assert_close(record, "level", ends)
    gain = PATH.alpha_sigma(ends)[1] / PATH.alpha_sigma(timesteps)[1]
    golden.assert_close(record, "noise_gain", gain)


@pytest.mark.parametrize("grid", ["stride", "proportional"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_a_constant_network_is_its_own_target(grid, iterations):
    how = Inversion(grid=grid, renoise_iterations=iterations)
    timesteps = tensor([0, 1, 7, 100, 437, 999])
    x0, constant = normal(0, 0, torch.arange(6), (4, 8, 8)), normal(1, 0, torch.arange(6), (4, 8, 8))
    posed = inverted(
        PATH, x0, timesteps, 0, 0, torch.arange(6), network=Rows(constant), cond=Indices(torch.arange(6)), how=how
    )
    torch.testing.assert_close(posed.target, constant, rtol=0, atol=2e-5)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (posed.alpha, posed.sigma))
    torch.testing.assert_close(posed.xt, alpha * x0 + sigma * constant, rtol=0, atol=1e-5)


def test_a_v_network_that_means_the_same_noise_gives_the_same_latents():
    v_path = DDPMPath.from_config(SD | {"prediction_type": "v_prediction"})
    timesteps = tensor([300, 812])
    x0, constant = normal(0, 0, torch.arange(2), (4, 8, 8)), normal(1, 0, torch.arange(2), (4, 8, 8))

    def v_network(xt, fed, cond):
        # v = (noise - sigma * x) / alpha; level 0 is the clean image here.
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in PATH.alpha_sigma(fed))
        clean = (fed == 0).view(-1, 1, 1, 1)
        alpha, sigma = alpha.where(~clean, 1.0), sigma.where(~clean, 0.0)
        return (constant[cond.rows] - sigma * xt) / alpha

    by_v = invert(v_path, x0, timesteps, v_network, Indices(torch.arange(2)), EXACT)
    by_noise = invert(PATH, x0, timesteps, Rows(constant), Indices(torch.arange(2)), EXACT)
    torch.testing.assert_close(by_v, by_noise, rtol=1e-5, atol=1e-5)


@dataclass
class Indices:
    rows: Tensor

    def select(self, rows):
        return Indices(self.rows[rows])


@dataclass
class Rows:
    """Predict a constant that belongs to the row."""

    constants: Tensor

    def __call__(self, xt, timesteps, cond):
        return self.constants[cond.rows]


@pytest.mark.parametrize("mode", ["exact", "official_compat"])
@pytest.mark.parametrize(("iterations", "eta"), [(0, 0.0), (1, 0.1)])
def test_a_pair_does_not_depend_on_its_batch(unet, mode, iterations, eta):
    how = Inversion(mode=mode, renoise_iterations=iterations, eta=eta)
    ids, timesteps = tensor([5, 9, 11]), tensor([30, 997, 412])
    x0, cond = normal(0, 0, torch.arange(6), (4, 8, 8)), Prompts(normal(2, 0, torch.arange(6), (5, 12)))
    network = FrozenDenoiser(unet, predict)
    together = inverted(PATH, x0, timesteps, 3, 4, ids, network=network, cond=cond, how=how)
    for pair in range(3):
        rows = tensor([pair, pair + 3])
        alone = inverted(
            PATH, x0[rows], timesteps[[pair]], 3, 4, ids[[pair]], network=network, cond=cond.select(rows), how=how
        )
        torch.testing.assert_close(alone.xt, together.xt[rows], rtol=0, atol=2e-5)
    assert together.xt.isfinite().all()
    assert len(together.xt.unique()) == together.xt.numel()


def test_images_that_arrived_are_not_evaluated_again(unet):
    sizes = []

    def network(xt, timesteps, cond):
        sizes.append(len(xt))
        return formula(xt, timesteps, cond)

    timesteps = torch.arange(1000)
    invert(PATH, torch.zeros(1000, 1, 2, 2), timesteps, network, NoPrompts(), EXACT)
    assert sizes == sorted(sizes, reverse=True)
    # ceil(t / 100) evaluations, and one for t = 0.
    assert sum(sizes) == sum(max(1, math.ceil(t / 100)) for t in range(1000))
    assert 5.4 < sum(sizes) / 1000 < 5.5


def test_inversion_ends_where_the_one_step_estimate_is_exact(unet):
    """With many steps the sampler's equation is nearly solved: decoding the latent back gives x0 again."""
    network = FrozenDenoiser(unet, predict)
    x0, cond = 0.5 * normal(0, 0, torch.arange(2), (4, 8, 8)), Prompts(normal(2, 0, torch.arange(2), (5, 12)))
    losses = []
    for steps in (2, 50):
        posed = inverted(
            PATH, x0, tensor([300]), 0, 0, tensor([1]), network=network, cond=cond, how=Inversion(num_steps=steps)
        )
        pred = network(posed.xt, posed.timesteps, cond)
        losses.append((pred - posed.target).square().mean())
    random = normal(7, 0, torch.arange(2), (4, 8, 8))
    assert max(losses) < 0.5 * random.square().mean()


def test_renoise_at_the_destination_is_another_latent(unet):
    network, cond = FrozenDenoiser(unet, predict), Prompts(normal(2, 0, torch.arange(2), (5, 12)))
    x0, timesteps = normal(0, 0, torch.arange(2), (4, 8, 8)), tensor([500, 200])
    source = Inversion(renoise_iterations=1)
    at_source, at_destination, ddim = (
        invert(PATH, x0, timesteps, network, cond, how)
        for how in (source, replace(source, renoise_at="destination"), EXACT)
    )
    assert (at_source - at_destination).abs().max() > 1e-4
    assert (at_source - ddim).abs().max() > 1e-4


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"eta": -0.1}, {"renoise_iterations": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="needs num_steps >= 1"):
        Inversion(**wrong)


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ConfigError, match="at most 1000"):
        plan(PATH, tensor([5]), Inversion(num_steps=1001))
