"""A small UNet of the class that Stable Diffusion uses, and conditioning to feed it."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffalign.denoising import DDPMPath, normal, sample_timesteps, shared


@dataclass(frozen=True)
class Prompts:
    """Conditioning of N images: what `FrozenDenoiser` needs of a backbone's is `select`."""

    prompt_embeds: Tensor

    def select(self, indices):
        return Prompts(self.prompt_embeds[indices])


def predict(denoiser, xt, timesteps, cond):
    return denoiser(xt, timesteps, encoder_hidden_states=cond.prompt_embeds).sample


@pytest.fixture
def unet():
    """Return a random UNet in training mode."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).train()


@pytest.fixture
def batch():
    """Return 3 pairs under shared noise."""
    path = DDPMPath.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    ids = torch.arange(3)
    return shared(path, normal(1, 0, torch.arange(6), (4, 8, 8)), sample_timesteps(path, 0, 0, ids), 0, 0, ids)


@pytest.fixture
def cond():
    """Return conditioning of 3 pairs, one prompt a pair."""
    return Prompts(normal(2, 0, torch.arange(3), (5, 12)).repeat(2, 1, 1))
