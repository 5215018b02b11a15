"""A tiny SDXL, prompts for it and a sampler over it."""

import pytest
import torch

from diffalign.backbones import loading
from diffalign.denoising import FrozenDenoiser
from diffalign.rollout import PromptEncoder, Sampler

TEXTS = ["a red circle", "a blue square on a green background", "a photo of the cat"]


@pytest.fixture(scope="session")
def backbone(tiny_sdxl):
    """Return a random-weight SDXL in training mode; tests leave its weights alone."""
    loaded = loading.load(tiny_sdxl)
    loaded.denoiser.train()
    return loaded


@pytest.fixture
def prompts(backbone):
    """Return three prompts."""
    return PromptEncoder(backbone, 64)(TEXTS, torch.device("cpu"))


@pytest.fixture
def make_sampler(backbone):
    """Return a function that makes a sampler of latents [4,8,8]."""

    def make(**settings):
        network = FrozenDenoiser(backbone.denoiser, backbone.predict, micro_batch_size=16)
        return Sampler(**{"path": backbone.path, "network": network, "shape": (4, 8, 8), "seed": 3, **settings})

    return make


class Brightness:
    """Judge latents by their mean: a scorer that needs no pictures."""

    def __init__(self, reads_prediction=True, scale=100.0):
        self.reads_prediction, self.scale = reads_prediction, scale
        self.timesteps = []

    def __call__(self, latents, prompts, timesteps):
        assert len(prompts) == len(latents) == len(timesteps)
        self.timesteps.append(timesteps[0].item())
        return latents.flatten(1).mean(1)[None]


class Redness:
    """Judge pictures by their first channel: a differentiable reward model."""

    def score_tensor(self, images, prompts):
        return images[:, 0].flatten(1).mean(1)
