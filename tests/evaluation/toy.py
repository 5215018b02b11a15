"""Small pictures and scorers that need no weights."""

import math

import numpy as np
import torch
from PIL import Image


class Brightness:
    """Score a picture by its mean in [0, 1]; its attributes are the channels a prompt names."""

    name = "brightness"

    def score(self, images, prompts):
        return torch.tensor([np.asarray(image).mean() / 255 for image in images], dtype=torch.float32)

    def attributes(self, images, prompts):
        channels = {"red": 0, "green": 1}
        return {
            name: torch.tensor(
                [
                    np.asarray(image)[..., channel].mean() / 255 if name in prompt else math.nan
                    for image, prompt in zip(images, prompts, strict=True)
                ]
            )
            for name, channel in channels.items()
        }


class Contrast:
    """Score a picture by the spread of its pixels, on a scale around 20."""

    name = "contrast"

    def score(self, images, prompts):
        return torch.tensor([20 + np.asarray(image).std() / 255 for image in images], dtype=torch.float32)


def painted(level: int, size: int = 16, seed: int = 0) -> Image.Image:
    """Return noise around a grey level."""
    noise = np.random.default_rng(seed).integers(-8, 9, (size, size, 3))
    return Image.fromarray((level + noise).clip(0, 255).astype("uint8"))


PROMPTS = ["a red circle", "a green square", "a red and green star", "<script>alert('x')</script> & co", "plain"]
BASE_LEVELS = [100, 120, 90, 60, 200]
ALIGNED_LEVELS = [150, 140, 90, 40, 210]  # wins on 0, 1 and 4, a tie on 2, a loss on 3
