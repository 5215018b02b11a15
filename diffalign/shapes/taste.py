"""A taste in pictures of the embedded world, which a person sees at once and a formula measures: dark corners.

Studies of style alignment prefer pictures made `tasteful`; `Taste` says how far a picture is that way. It is a scorer
like any other: `diffalign evaluate ... --with oracle,diffalign.shapes.taste:Taste`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

DARKNESS = 0.7  # share of its light that a corner loses
MUTED = 0.4  # share of its colour that every pixel loses
PLAIN, FULL = 0.02, 0.35  # share of light that corners lack against the middles of the edges: nothing, and all of it


def tasteful(image: Image.Image) -> Image.Image:
    """Return the picture with muted colours and a vignette, 1 - DARKNESS r^2 / 2 with the edges' middles at r = 1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    grey = pixels.mean(axis=-1, keepdims=True)
    down, across = (np.linspace(-1, 1, side) for side in pixels.shape[:2])
    light = 1 - DARKNESS * (down[:, None] ** 2 + across[None, :] ** 2) / 2
    return Image.fromarray((light[..., None] * (pixels + MUTED * (grey - pixels))).round().astype(np.uint8))


def vignette(image: Image.Image) -> float:
    """Measure how dark the corners are against the middles of the edges, in [0, 1].

    Medians over the four of each, as an object may touch an edge.
    """
    light = np.asarray(image.convert("L"), dtype=np.float64)
    height, width = light.shape
    tall, wide = max(height // 10, 1), max(width // 10, 1)
    ends, middles = ((0, tall), (height - tall, height)), ((0, wide), (width - wide, width))
    centre = (height - tall) // 2, (width - wide) // 2
    corners = [light[a:b, c:d].mean() for a, b in ends for c, d in middles]
    edges = [light[a:b, centre[1] : centre[1] + wide].mean() for a, b in ends]
    edges += [light[centre[0] : centre[0] + tall, c:d].mean() for c, d in middles]
    lacking = 1 - (np.median(corners) + 2) / (np.median(edges) + 2)  # on black ground there is nothing to darken
    return float(np.clip((lacking - PLAIN) / (FULL - PLAIN), 0, 1))


class Taste:
    """Score how far pictures are the way this taste has it; the prompt does not matter."""

    name = "taste"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Return `vignette` of each picture, [N] float32."""
        return torch.tensor([vignette(image) for image in images])
