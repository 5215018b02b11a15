"""The ladder and the step of the published samplers, against golden records of their code."""

import pytest
import torch
from torch import tensor

from diffalign.denoising import (
    FlowPath,
    TransitionBatch,
    ddim_step,
    guided,
    ladder,
    normal,
    transition_likelihoods,
)
from diffalign.errors import ConfigError
from diffalign.objectives import load
from tests import golden
from tests.denoising.conftest import Prompts
from tests.denoising.test_paths import latents, records, repeated_timestep, stable_diffusion_path

ONLINE = golden.load("online")
PATH = stable_diffusion_path("epsilon")


def step_of(record, key):
    """Return the step that a record's prediction `key` makes."""
    timesteps = repeated_timestep(record)
    previous = (timesteps - 1000 // record["inputs"]["N"]).clamp(min=0)
    return ddim_step(PATH, latents(record, "x_t"), latents(record, key), timesteps, previous)


@pytest.mark.parametrize("record", records("ddim_ladder_"))
def test_ladder(record):
    rungs = ladder(PATH, record["inputs"]["N"])
    golden.assert_close(record, "timesteps", rungs.timesteps)
    golden.assert_close(record, "prev_timesteps", rungs.previous)
    xt = torch.zeros(len(rungs), 1, 1, 1)
    pred = torch.ones_like(xt, requires_grad=True)
    step = ddim_step(PATH, xt, pred, rungs.timesteps, rungs.previous)
    step.mean.sum().backward()
    golden.assert_close(record, "sigma", step.std)
    golden.assert_close(record, "sigma_float64", step.std)
    golden.assert_close(record, "kappa_float64", pred.grad.flatten())


@pytest.mark.parametrize("record", records("ddim_step_"))
def test_step(record):
    step = step_of(record, "eps_pred")
    golden.assert_close(record, "mean", step.mean)
    golden.assert_close(record, "x0_hat", step.x0)
    golden.assert_close(record, "std", step.std[0])
    golden.assert_close(record, "log_prob", step.log_prob(latents(record, "x_prev")))


@pytest.mark.parametrize(
    "name", [name for name in ONLINE if "_step_N" in name and name.split("_")[0] in ("spo", "lpo")]
)
def test_loss_and_gradient_of_a_pair_of_steps(name):
    record = ONLINE[name]
    timesteps = repeated_timestep(record)
    batch = TransitionBatch(
        xt=latents(record, "x_t")[:, None],
        x_prev=torch.stack([latents(record, "x_prev_w"), latents(record, "x_prev_l")], dim=1),
        timesteps=timesteps,
        previous=(timesteps - 1000 // record["inputs"]["N"]).clamp(min=0),
        prompt=torch.arange(2),
        kept=torch.ones(2, dtype=torch.bool),
    )
    policy = latents(record, "eps_theta").requires_grad_()
    found = transition_likelihoods(PATH, batch, policy, latents(record, "eps_ref"), eta=1.0)
    golden.assert_close(record, "logp_theta_w", found.log_prob_w)
    golden.assert_close(record, "logp_theta_l", found.log_prob_l)
    golden.assert_close(record, "logp_ref_w", found.reference_log_prob_w)
    golden.assert_close(record, "logp_ref_l", found.reference_log_prob_l)
    loss = load("spo", beta=record["hyperparameters"]["beta"]).loss(found)
    golden.assert_close(record, "per_example_loss", loss)
    loss.mean().backward()
    golden.assert_close(record, "grad_eps", policy.grad)
    clipped = name.startswith("spo_all_clipped")
    assert bool(policy.grad.any()) != clipped, "only a ratio outside the clip has no gradient"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_log_probability_of_a_stored_sample_is_the_same_again(dtype):
    ids, rungs = torch.arange(3), ladder(PATH, 20)
    xt, pred, noise = (normal(0, 0, ids, (4, 8, 8), stream) for stream in "abc")
    for index in (0, 10, 18, 19):
        step = ddim_step(PATH, xt, pred, *(level[index].repeat(3) for level in (rungs.timesteps, rungs.previous)))
        stored = step.sample(noise, dtype)
        assert torch.equal(stored, stored.to(dtype).float())
        old = step.log_prob(stored)
        again = ddim_step(PATH, xt, pred, *(level[index].repeat(3) for level in (rungs.timesteps, rungs.previous)))
        assert torch.equal(again.log_prob(stored.to(dtype)), old)
    # Without the rounding it is -mean(z^2)/2 - log std - log(2 pi)/2.
    closed = -0.5 * noise.square().flatten(1).mean(1) - step.std.log() - 0.9189385
    torch.testing.assert_close(step.log_prob(step.sample(noise)), closed, rtol=1e-3, atol=1e-3)


def test_score_matching_of_gradspo():
    record = ONLINE["gradspo_t501"]
    eps, reference, behavior, noise = (latents(record, key) for key in ("eps_theta", "eps_ref", "eps_ema", "n"))
    t = torch.tensor([501, 501])
    step = ddim_step(PATH, torch.zeros_like(eps), behavior, t, t - 50)
    # Samples of the averaged network whose noise differs by 2 n.
    ends = [step.sample(factor * noise) for factor in (1, -1)]
    batch = TransitionBatch(
        xt=torch.zeros_like(eps)[:, None],
        x_prev=torch.stack(ends, dim=1),
        timesteps=t,
        previous=t - 50,
        prompt=torch.arange(2),
        kept=torch.ones(2, dtype=torch.bool),
        behavior_pred=behavior,
    )
    hyperparameters = record["hyperparameters"]
    eps.requires_grad_()
    found = transition_likelihoods(PATH, batch, eps, reference, 1.0, hyperparameters["grad_scale"])
    golden.assert_close(record, "l_theta_plus", found.log_prob_w)
    golden.assert_close(record, "l_theta_minus", found.log_prob_l)
    golden.assert_close(record, "l_ref_plus", found.reference_log_prob_w)
    golden.assert_close(record, "l_ref_minus", found.reference_log_prob_l)
    loss = load("spo", beta=hyperparameters["beta"], ratio_clip=hyperparameters["ratio_clip"]).loss(found)
    golden.assert_close(record, "per_example_loss", loss)
    loss.mean().backward()
    golden.assert_close(record, "grad_eps", eps.grad)


def test_v_prediction_makes_the_same_step():
    ids, t, p = torch.arange(2), tensor([501, 51]), tensor([451, 1])
    xt, eps = (normal(0, 0, ids, (4, 4, 4), stream) for stream in "ab")
    alpha, sigma = (value.view(2, 1, 1, 1) for value in PATH.alpha_sigma(t))
    v = (eps - sigma * xt) / alpha
    expected = ddim_step(PATH, xt, eps, t, p)
    found = ddim_step(stable_diffusion_path("v_prediction"), xt, v, t, p)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.std, expected.std)


@pytest.mark.parametrize("count", [0, -1, 1000, 1001])
def test_a_ladder_that_does_not_fit_is_refused(count):
    with pytest.raises(ConfigError, match="num_inference_steps"):
        ladder(PATH, count)


class Both(Prompts):
    """Conditioning that can be concatenated, as a backbone's."""

    def select(self, indices):
        return Both(self.prompt_embeds[indices])

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([part.prompt_embeds for part in parts]))


def test_guidance_mixes_both_branches_with_gradient():
    weight = tensor(2.0, requires_grad=True)
    cond, empty = Both(torch.ones(3, 1)), Both(torch.full((1, 1), 0.25))
    seen = []

    def network(xt, timesteps, prompts):
        seen.append((len(xt), len(timesteps)))
        return weight * prompts.prompt_embeds.view(-1, 1, 1, 1) + 0 * xt

    xt = torch.zeros(3, 1, 1, 1)
    mixed = guided(network, xt, torch.full((3,), 5), cond, empty, 5.0)
    assert mixed.flatten().tolist() == [2 * (0.25 + 5 * 0.75)] * 3
    mixed[0].sum().backward()
    assert weight.grad == 0.25 + 5 * 0.75
    plain = guided(network, xt, torch.full((3,), 5), cond, empty, 1.0)
    assert plain.flatten().tolist() == [2.0] * 3
    assert seen == [(6, 6), (3, 3)]


def test_a_flow_path_has_no_ddim_steps():
    message = "DDIM steps, as spo, .* this model follows a flow path. Choose an objective of pairs"
    with pytest.raises(ConfigError, match=message):
        ladder(FlowPath(), 20)
    xt, level = torch.zeros(1, 4, 2, 2), tensor([500.0])
    with pytest.raises(ConfigError, match=message):
        ddim_step(FlowPath(), xt, xt, level, level - 50)
