"""Draw a scene: anti-aliased shapes on a plain ground, placed at random within what the caption allows.

All lengths are fractions of the image side; `radius` is half the side of the box a shape fills.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from diffalign.shapes.captions import PALETTE, Scene

OVERSAMPLING = 4
COLOR_JITTER = 6.0  # standard deviation per channel, in 1/255
RADIUS = {"small": 0.13, None: 0.19, "large": 0.27}
RADIUS_BY_COUNT = {2: 0.16, 3: 0.13}
OFFSET = 0.22  # how far a positioned object sits from the middle
GAP = 0.05  # smallest distance between the boxes of two objects


def _regular(points: int, radius: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Return a polygon's corners around the origin, first corner up; `inner` makes a star."""
    corners = points if inner is None else 2 * points
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(corners)]
    return [
        (r * math.sin(2 * math.pi * i / corners), -r * math.cos(2 * math.pi * i / corners)) for i, r in enumerate(radii)
    ]


def outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape that fills the box [-1, 1] x [-1, 1]."""
    arm = 1 / 3
    polygons = {
        "circle": _regular(64, 1.0),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "star": _regular(5, 1.0, inner=0.42),
        "cross": [
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        ],
    }
    corners = np.asarray(polygons[shape], dtype=float)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return [tuple(point) for point in 2 * (corners - low) / (high - low) - 1]


def coverage(shape: str, height: int, width: int) -> np.ndarray:
    """Return the share of every pixel that a shape filling the whole box covers, [height, width] in [0, 1]."""
    canvas = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    corners = [((x + 1) / 2 * canvas.width, (y + 1) / 2 * canvas.height) for x, y in outline(shape)]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255


def place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Draw centre x, centre y and radius of every object of a scene."""
    if scene.count > 1:
        return _scatter(scene.count, rng)
    radius = RADIUS[scene.size] * rng.uniform(0.93, 1.07)
    dx, dy = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}.get(scene.position or "", (0, 0))
    x, y = (0.5 + OFFSET * step + rng.uniform(-0.03, 0.03) for step in (dx, dy))
    edge = radius + 0.03
    return [(min(max(x, edge), 1 - edge), min(max(y, edge), 1 - edge), radius)]


def _scatter(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    radius = RADIUS_BY_COUNT[count] * rng.uniform(0.93, 1.07)
    edge = radius + 0.04
    while True:
        spots = [(rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)) for _ in range(count)]
        pairs = [(a, b) for i, a in enumerate(spots) for b in spots[:i]]
        if all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2 * radius + GAP for a, b in pairs):
            return [(x, y, radius) for x, y in spots]


def _color(name: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(round(min(max(channel + rng.gauss(0, COLOR_JITTER), 0), 255)) for channel in PALETTE[name])


def render(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB image of `size` x `size` pixels."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _color(scene.background, rng))
    draw, color = ImageDraw.Draw(canvas), _color(scene.color, rng)
    corners = outline(scene.shape)
    for x, y, radius in place(scene, rng):
        draw.polygon([((x + radius * u) * side, (y + radius * v) * side) for u, v in corners], fill=color)
    return canvas.reduce(OVERSAMPLING)
