"""Inversion of the flow ODE: Euler's steps up from the clean latent, each image to its own level."""

import math
from dataclasses import replace

import pytest
import torch
from torch import tensor

from diffalign.denoising import FlowPath, FrozenDenoiser, Inversion, invert, inverted, normal
from diffalign.denoising.inversion import plan
from diffalign.errors import ConfigError
from tests.denoising.conftest import Prompts, predict

PATH = FlowPath()
TIMESTEPS = tensor([0.5, 30.0, 437.25, 1000.0])
X0 = normal(0, 0, torch.arange(4), (4, 8, 8))


class NoPrompts:
    def select(self, rows):
        return self


def in_proportion(xt, timesteps, cond):
    """Stand in for a network: the velocity is half of x, so that x grows as e^(s/2)."""
    return 0.5 * xt


def growth(steps):
    """Return what Euler's `steps` of the levels in (0, s) multiply x by."""
    return torch.stack([math.prod(1 + 0.5 * (b - a) for a, b in levels) for levels in steps])


def hops(how):
    planned = plan(PATH, TIMESTEPS, how)
    pairs = torch.stack([planned.source, planned.destination], dim=-1).double()
    return [pairs[i, : planned.count[i]] for i in range(len(TIMESTEPS))]


@pytest.mark.parametrize("grid", ["stride", "proportional"])
def test_every_image_ends_on_its_own_level(grid):
    how = Inversion(num_steps=4, grid=grid)
    for taken, timestep in zip(hops(how), TIMESTEPS.tolist(), strict=True):
        assert taken[0, 0] == 0
        assert taken[-1, 1] == pytest.approx(timestep / 1000, rel=1e-6)
        assert torch.equal(taken[1:, 0], taken[:-1, 1])
    counts = plan(PATH, TIMESTEPS, how).count.tolist()
    assert counts == ([1, 1, 2, 4] if grid == "stride" else [4, 4, 4, 4])
    xt = invert(PATH, X0, TIMESTEPS, in_proportion, NoPrompts(), how)
    torch.testing.assert_close(xt, growth(hops(how)).float().view(-1, 1, 1, 1) * X0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", ["stride", "proportional"])
def test_a_network_is_told_where_it_stands(grid):
    fed = []

    def network(xt, timesteps, cond):
        fed.append(timesteps.tolist())
        assert timesteps.dtype == torch.float32
        return in_proportion(xt, timesteps, cond)

    invert(PATH, X0[:1], tensor([650.0]), network, NoPrompts(), Inversion(num_steps=4, grid=grid))
    assert fed == ([[0], [250], [500]] if grid == "stride" else [[0], [162.5], [325], [487.5]])


def test_more_steps_come_closer_to_the_ode():
    exact = (TIMESTEPS.double() / 2000).exp().float().view(-1, 1, 1, 1) * X0
    off = [
        (invert(PATH, X0, TIMESTEPS, in_proportion, NoPrompts(), Inversion(num_steps=steps)) - exact).abs().max().item()
        for steps in (5, 50)
    ]
    assert off[1] < off[0] / 8  # of first order
    assert off[1] < 0.02


def test_one_renoise_iteration_is_heuns_step():
    """Where the velocity knows no time, the mean of both velocities makes the step of second order."""
    how = Inversion(num_steps=4, grid="proportional", renoise_iterations=1)
    xt = invert(PATH, X0, TIMESTEPS, in_proportion, NoPrompts(), how)
    factors = [math.prod(1 + (h := 0.5 * (b - a)) + h * h / 2 for a, b in levels) for levels in hops(how)]
    torch.testing.assert_close(xt, torch.stack(factors).float().view(-1, 1, 1, 1) * X0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", ["stride", "proportional"])
@pytest.mark.parametrize("iterations", [0, 2])
def test_a_constant_velocity_is_its_own_target(grid, iterations):
    constant = normal(1, 0, torch.arange(4), (4, 8, 8))
    timesteps = tensor([30.0, 437.25])

    def network(xt, fed, cond):
        return constant[cond.prompt_embeds]

    posed = inverted(
        PATH, X0, timesteps, 0, 0, torch.arange(2), network=network, cond=Prompts(torch.arange(4)),
        how=Inversion(grid=grid, renoise_iterations=iterations),
    )  # fmt: skip
    torch.testing.assert_close(posed.target, constant, rtol=0, atol=1e-4)  # rounding of x, divided by s = 0.03
    sigma = posed.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(posed.xt, X0 + sigma * constant, rtol=0, atol=5e-6)
    torch.testing.assert_close(PATH.to_x0(posed.xt, posed.target, posed.timesteps), X0, rtol=0, atol=5e-6)


def test_a_pair_does_not_depend_on_its_batch(unet):
    how = Inversion(renoise_iterations=1)
    ids, timesteps = tensor([5, 9]), tensor([30.25, 997.5])
    x0, cond = normal(0, 0, torch.arange(4), (4, 8, 8)), Prompts(normal(2, 0, torch.arange(4), (5, 12)))
    network = FrozenDenoiser(unet, predict)
    together = inverted(PATH, x0, timesteps, 3, 4, ids, network=network, cond=cond, how=how)
    assert together.timesteps.dtype == torch.float32
    for pair in range(2):
        rows = tensor([pair, pair + 2])
        alone = inverted(
            PATH, x0[rows], timesteps[[pair]], 3, 4, ids[[pair]], network=network, cond=cond.select(rows), how=how
        )
        torch.testing.assert_close(alone.xt, together.xt[rows], rtol=0, atol=2e-5)
    assert len(together.xt.unique()) == together.xt.numel()


def test_renoise_at_the_destination_is_another_latent(unet):
    network, cond = FrozenDenoiser(unet, predict), Prompts(normal(2, 0, torch.arange(4), (5, 12)))
    source = Inversion(renoise_iterations=1)
    latents = [
        invert(PATH, X0, TIMESTEPS, network, cond, how)
        for how in (source, replace(source, renoise_at="destination"), Inversion())
    ]
    for one, other in ((0, 1), (0, 2)):
        assert (latents[one] - latents[other]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            Inversion(mode="official_compat"),
            '"official_compat" is defined for .* DDPM.* Choose "exact"',
        ),
        (Inversion(eta=0.1), "Fresh noise .* flow path. Set inversion.eta to 0"),
        (Inversion(num_steps=1001), "at most 1000"),
    ],
)
def test_what_a_flow_does_not_have_is_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        invert(PATH, X0, TIMESTEPS, in_proportion, NoPrompts(), how)
