"""A schedule that ends in pure noise (alpha = 0): v prediction is well defined there, and so is all that follows."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import tensor

from diffalign.denoising import (
    STABLE_DIFFUSION,
    DDPMPath,
    Inversion,
    TransitionBatch,
    add_noise,
    ddim_step,
    ends_in_noise,
    inverted,
    ladder,
    normal,
    target,
    to_epsilon,
    to_x0,
    transition_likelihoods,
)
from tests.denoising.conftest import Prompts

CONFIG = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PATH = DDPMPath.from_config(CONFIG)
IDS, LAST = torch.arange(3), tensor([999, 999, 999])
X, V, OTHER, NOISE = (normal(0, 0, IDS, (8, 4, 4), stream) for stream in "abcd")


def transitions(v):
    """Return single transitions 999 -> 949 of a sampler that predicted v."""
    ends = ddim_step(PATH, X, v, LAST, LAST - 50).sample(NOISE)
    given = {"behavior_pred": v, "advantages": torch.ones(3), "behavior_log_prob": torch.zeros(3)}
    return TransitionBatch(
        xt=X[:, None], x_prev=ends[:, None], timesteps=LAST, previous=LAST - 50, prompt=IDS, kept=IDS >= 0, **given
    )


def test_only_a_rescaled_schedule_ends_in_pure_noise():
    assert ends_in_noise(PATH)
    assert not ends_in_noise(DDPMPath.from_config(STABLE_DIFFUSION))


def test_there_v_is_minus_x0_and_the_noise_is_xt():
    assert torch.equal(add_noise(PATH, V, X, LAST), X)
    assert torch.equal(target(PATH, V, X, LAST), -V)
    assert torch.equal(to_x0(PATH, X, V, LAST), -V)
    assert torch.equal(to_epsilon(PATH, X, V, LAST), X)


def test_both_sides_survive_the_round_trip_at_every_level():
    timesteps = torch.arange(1000)
    x0, noise = (normal(1, 0, timesteps, (2, 2, 2), stream) for stream in "ab")
    xt, v = add_noise(PATH, x0, noise, timesteps), target(PATH, x0, noise, timesteps)
    torch.testing.assert_close(to_x0(PATH, xt, v, timesteps), x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(to_epsilon(PATH, xt, v, timesteps), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 10, 20, 30, 50])
def test_sampling_starts_at_pure_noise_with_the_trailing_levels_of_diffusers(count):
    scheduler = EulerDiscreteScheduler(**CONFIG, timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    rungs = ladder(PATH, count)
    assert rungs.timesteps.tolist() == scheduler.timesteps.tolist()
    assert rungs.timesteps[0] == 999
    assert rungs.previous.tolist() == [*rungs.timesteps[1:].tolist(), 0]


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("t", [999, 949, 499])
def test_a_step_is_that_of_diffusers(t, eta):
    scheduler = DDIMScheduler(**CONFIG, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    expected = scheduler.step(V, t, X, eta=eta, variance_noise=NOISE).prev_sample
    step = ddim_step(PATH, X, V, tensor([t] * 3), tensor([t - 50] * 3), eta)
    torch.testing.assert_close(step.sample(NOISE), expected, rtol=1e-3, atol=1e-3)


def test_the_first_step_draws_x_p_from_what_is_predicted_alone():
    """q(x_p | x0) itself: pure noise at the start says nothing, so nothing of it is kept."""
    v = V.clone().requires_grad_()
    step = ddim_step(PATH, X, v, LAST, LAST - 50)
    alpha, sigma = PATH.alpha_sigma(LAST - 50)
    torch.testing.assert_close(step.mean, -alpha[0] * V)
    torch.testing.assert_close(step.std, sigma)
    step.log_prob(step.sample(NOISE)).sum().backward()
    residual = -alpha[0] * NOISE / sigma[0] / V[0].numel()
    torch.testing.assert_close(v.grad, residual, rtol=1e-3, atol=1e-7)


def test_the_drift_of_dpok_is_the_divergence_of_the_first_step_too():
    batch, policy = transitions(OTHER), V.clone().requires_grad_()
    found = transition_likelihoods(PATH, batch, policy, OTHER, eta=1.0)
    means = [ddim_step(PATH, X, v, LAST, LAST - 50).mean for v in (V, OTHER)]
    alpha, _ = PATH.alpha_sigma(LAST - 50)
    between = (means[0] - means[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(found.drift, between / alpha.square(), rtol=1e-3, atol=0)
    found.drift.sum().backward()
    assert policy.grad.abs().max() > 1e-3


def test_gradspo_learns_nothing_where_the_score_does_not_depend_on_v():
    single = transitions(OTHER)
    pair = TransitionBatch(
        xt=single.xt,
        x_prev=torch.cat([single.x_prev, ddim_step(PATH, X, OTHER, LAST, LAST - 50).sample(-NOISE)[:, None]], dim=1),
        timesteps=LAST,
        previous=LAST - 50,
        prompt=IDS,
        kept=IDS >= 0,
        behavior_pred=OTHER,
    )
    policy = V.clone().requires_grad_()
    found = transition_likelihoods(PATH, pair, policy, OTHER, eta=1.0, grad_scale=0.5)
    assert torch.equal(found.log_prob_w, found.reference_log_prob_w)
    (found.log_prob_w - found.log_prob_l).sum().backward()
    assert not policy.grad.any()


@pytest.mark.parametrize("renoise", [0, 2])
@pytest.mark.parametrize("renoise_at", ["source", "destination"])
@pytest.mark.parametrize(("grid", "eta"), [("stride", 0.0), ("stride", 0.1), ("proportional", 0.0)])
def test_an_inversion_up_to_pure_noise_has_minus_x0_as_its_target(grid, eta, renoise, renoise_at):
    how = Inversion(num_steps=5, grid=grid, eta=eta, renoise_iterations=renoise, renoise_at=renoise_at)

    def network(xt, timesteps, cond):
        return 0.5 * xt - 0.1 * timesteps.view(-1, 1, 1, 1) / 1000

    cond = Prompts(torch.zeros(3, 1))
    found = inverted(PATH, V, LAST, 0, 0, IDS, network=network, cond=cond, how=how)
    assert torch.equal(found.target, -V)
    assert torch.equal(found.noise, found.xt)
    assert found.xt.isfinite().all()
    assert 0.1 < found.xt.std() < 10
