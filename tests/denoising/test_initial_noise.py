"""The line of text that says what a picture was drawn from, and what is refused of it."""

import doctest

import pytest
import torch

from diffalign import denoising
from diffalign.denoising import DDPMPath, FlowPath, InitialNoise, draw_noises, generating, initial_noise
from diffalign.errors import ConfigError, DataError

TEXT = "seed=7 shape=4x2x3 dtype=bfloat16 generator=cpu"
PATH = DDPMPath.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def test_it_is_read_back_and_drawn_as_torch_draws():
    noise = InitialNoise.parse(TEXT)
    assert noise == InitialNoise(7, (4, 2, 3), "bfloat16")
    assert str(noise) == TEXT
    stock = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    assert torch.equal(noise.draw(), stock[0].float())
    other = InitialNoise(7, (4, 2, 3), "float32").draw()
    assert not torch.equal(noise.draw(), other)  # rounding is not all that differs between types
    assert doctest.testmod(initial_noise, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "expected as in"),
        (TEXT.replace("cpu", "cuda"), "depend on the GPU and cannot be drawn again.*diffalign generate"),
        (TEXT.replace("bfloat16", "int8"), "a dtype of float32"),
        (TEXT.replace("4x2x3", "4x0x3"), "sides above 0"),
        (TEXT.replace("seed=7", f"seed={2**64}"), "a seed below"),
    ],
)
def test_what_cannot_be_drawn_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        InitialNoise.parse(text)


@pytest.mark.parametrize(
    ("noises", "shape", "message"),
    [
        (None, (4, 8, 8), "does not say what its pictures were drawn from.*diffalign generate MODEL.*rank"),
        ([None, TEXT], (4, 2, 3), "does not say what 1 of 2 pictures were drawn from"),
        (["seed=1 shape=4x8x8 dtype=float32 generator=cpu"], (16, 8, 8), "4x8x8.*16x8x8.*another VAE"),
        (["seed=1 shape=4x8x8 dtype=float32 generator=cpu"], (4, 4, 4), "multiply data.resolution by 2/1"),
        (["seed=1 shape=4x6x6 dtype=float32 generator=cpu"], (4, 4, 4), "multiply data.resolution by 3/2"),
        (["seed=1 shape=4x8x12 dtype=float32 generator=cpu"], (4, 8, 8), "Only square pictures"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_the_way_out(noises, shape, message):
    with pytest.raises(DataError, match=message):
        draw_noises(noises, shape, "pairs.parquet")


def test_every_picture_gets_its_own_noise_and_the_line_between_both():
    noises = [f"seed={seed} shape=2x4x4 dtype=float32 generator=cpu" for seed in range(4)]
    noise, x0 = draw_noises(noises, (2, 4, 4)), torch.randn(4, 2, 4, 4)
    timesteps = torch.tensor([250.0, 800.0])
    batch = generating(FlowPath(), x0, timesteps, noise)
    assert torch.equal(batch.timesteps, torch.tensor([250.0, 800.0, 250.0, 800.0]))
    s = torch.tensor([0.25, 0.8, 0.25, 0.8])[:, None, None, None]
    torch.testing.assert_close(batch.xt, (1 - s) * x0 + s * noise)
    assert torch.equal(batch.target, noise - x0)
    assert len(batch.noise.unique()) == batch.noise.numel()


def test_a_curved_path_is_refused():
    with pytest.raises(ConfigError, match=r"along a curve\. Choose denoising\.noising ddim_inversion \(InPO\)"):
        generating(PATH, torch.zeros(2, 4, 8, 8), torch.tensor([5]), torch.zeros(2, 4, 8, 8))


def test_it_is_one_of_the_noisings():
    assert denoising.GENERATING in denoising.NOISINGS
