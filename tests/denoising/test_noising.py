"""Noisings: what the members of a pair have in common, and that a batch is the sum of its examples."""

import dataclasses

import pytest
import torch

from diffalign.denoising import (
    RANDOM_NOISINGS,
    DDPMPath,
    FlowPath,
    add_noise,
    independent,
    normal,
    sample_timesteps,
    shared,
    target,
)

PATH = DDPMPath.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
)
PATHS = [pytest.param(PATH, id="ddpm"), pytest.param(FlowPath(), id="flow")]
IDS = torch.tensor([41, 7, 10**12])
TIMESTEPS = sample_timesteps(PATH, 0, 5, IDS)
X0 = normal(9, 0, torch.arange(6), (4, 8, 8))


def rows(batch, index):
    return {field.name: getattr(batch, field.name)[index] for field in dataclasses.fields(batch)}


def assert_equal_rows(got, expected):
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RANDOM_NOISINGS)
def test_batch_is_consistent_with_its_path(name, path):
    timesteps = sample_timesteps(path, 0, 5, IDS)
    batch = RANDOM_NOISINGS[name](path, X0, timesteps, 0, 5, IDS)
    assert torch.equal(batch.x0, X0)
    assert torch.equal(batch.timesteps, torch.cat([timesteps, timesteps]))
    assert torch.equal(torch.stack([batch.alpha, batch.sigma]), torch.stack(path.alpha_sigma(batch.timesteps)))
    assert torch.equal(batch.xt, add_noise(path, X0, batch.noise, batch.timesteps))
    assert torch.equal(batch.target, target(path, X0, batch.noise, batch.timesteps))
    assert all(tensor.dtype == torch.float32 for tensor in (batch.x0, batch.noise, batch.xt, batch.target, batch.alpha))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RANDOM_NOISINGS)
def test_pairs_do_not_depend_on_their_batch(name, path):
    noise, timesteps = RANDOM_NOISINGS[name], sample_timesteps(path, 0, 5, IDS)
    batch = noise(path, X0, timesteps, 0, 5, IDS)
    for pair in range(3):
        members = [pair, pair + 3]
        alone = noise(path, X0[members], timesteps[[pair]], 0, 5, IDS[[pair]])
        assert_equal_rows(rows(alone, slice(None)), rows(batch, members))


def test_shared_gives_winner_and_loser_the_same_noise():
    batch = shared(PATH, X0, TIMESTEPS, 0, 5, IDS)
    noise_w, noise_l = batch.noise.chunk(2)
    assert torch.equal(noise_w, noise_l)
    assert not torch.equal(noise_w[0], noise_w[1])


def test_independent_gives_each_image_its_own_noise():
    noise = independent(PATH, X0, TIMESTEPS, 0, 5, IDS).noise
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(6)).abs().max() < 5 / 256**0.5
    assert len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("name", RANDOM_NOISINGS)
def test_winners_alone_get_the_noise_they_have_in_a_pair(name):
    noise = RANDOM_NOISINGS[name]
    alone, pairs = noise(PATH, X0[:3], TIMESTEPS, 0, 5, IDS), noise(PATH, X0, TIMESTEPS, 0, 5, IDS)
    assert_equal_rows(rows(alone, slice(None)), rows(pairs, slice(0, 3)))


def test_the_images_of_a_list_differ_under_independent_noise():
    x0 = torch.cat([X0, X0])
    batch = independent(PATH, x0, TIMESTEPS, 0, 5, IDS)
    assert len(batch.noise.unique()) == batch.noise.numel()
    assert torch.equal(batch.timesteps, TIMESTEPS.repeat(4))
    assert_equal_rows(rows(batch, slice(0, 6)), rows(independent(PATH, X0, TIMESTEPS, 0, 5, IDS), slice(None)))


@pytest.mark.parametrize("name", RANDOM_NOISINGS)
def test_another_step_or_seed_is_another_noise(name):
    noise = RANDOM_NOISINGS[name]
    first = noise(PATH, X0, TIMESTEPS, 0, 5, IDS).noise
    for seed, step in [(1, 5), (0, 6)]:
        assert not (noise(PATH, X0, TIMESTEPS, seed, step, IDS).noise == first).any()


def test_half_precision_latents_are_noised_in_float32():
    half = X0.half()
    batch, expected = (shared(PATH, x0, TIMESTEPS, 0, 5, IDS) for x0 in (half, half.float()))
    assert batch.x0.dtype == torch.float32
    assert_equal_rows(rows(batch, slice(None)), rows(expected, slice(None)))


def test_latents_that_are_not_pairs_are_refused():
    with pytest.raises(AssertionError, match="must be as many"):
        shared(PATH, X0[:5], TIMESTEPS, 0, 5, IDS)
