"""The oracle: measures from the pixels alone how well an image shows what its caption says.

Nothing here is learnt. The border gives the ground, pixels that differ from it are objects, connected objects are
counted, and each object's outline is compared with every shape of the grammar. Each attribute is a number in [0, 1];
the score of an image is the mean over the attributes its caption mentions. No training run may use it except to
label pairs: a reward that cannot be wrong would hide what real rewards get wrong.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from diffalign.shapes import render
from diffalign.shapes.captions import COLORS, PALETTE, SHAPES, Scene, parse

ATTRIBUTES = ("background", "color", "shape", "count", "size", "position")
CONTRAST = 0.12  # smallest RGB distance from the ground that counts as an object
SMALLEST_AREA = 0.004  # of the image; smaller specks are not objects
WRONG_SHAPE = 0.3  # factor when another shape fits an object better


def _ramp(value: float, zero: float, one: float) -> float:
    """Map `zero` to 0 and `one` to 1, linear between, clipped outside."""
    return float(np.clip((value - zero) / (one - zero), 0.0, 1.0))


def _closeness(pixels: np.ndarray, name: str) -> float:
    """Return how close RGB colours [N, 3] in [0, 1] are to a named one: 1 within 0.1, 0 beyond 0.45 (mean over N)."""
    distance = np.linalg.norm(pixels - np.asarray(PALETTE[name]) / 255, axis=-1)
    return float(np.clip((0.45 - distance) / 0.35, 0.0, 1.0).mean())


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    return render.coverage(shape, height, width) > 0.5


def _overlaps(mask: np.ndarray) -> dict[str, float]:
    """Return the intersection over union of an object, the mask of its bounding box [h, w], with every shape."""
    templates = {name: _template(name, *mask.shape) for name in SHAPES}
    return {name: (mask & t).sum() / max((mask | t).sum(), 1) for name, t in templates.items()}


def _shape_score(mask: np.ndarray, shape: str) -> float:
    """Score one object, given as the mask of its bounding box [h, w]."""
    height, width = mask.shape
    overlap = _overlaps(mask)
    aspect = min(height, width) / max(height, width)
    score = _ramp(overlap[shape], 0.5, 0.88) * _ramp(aspect, 0.4, 0.8)
    return score if max(overlap, key=overlap.get) == shape else WRONG_SHAPE * score


def _objects(image: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Return the label map [H, W] and the boxes of all objects, the largest first; label i + 1 belongs to box i."""
    distance = np.linalg.norm(image - ground, axis=-1)
    threshold = max(np.quantile(distance, 0.98) / 2, CONTRAST)
    labels, number = ndimage.label(distance > threshold, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(np.ones_like(labels), labels, range(1, number + 1))
    keep = [int(i) for i in np.argsort(-areas, kind="stable") if areas[i] >= SMALLEST_AREA * labels.size]
    ordered = np.zeros_like(labels)
    for new, old in enumerate(keep):
        ordered[labels == old + 1] = new + 1
    return ordered, ndimage.find_objects(ordered)


def _border(pixels: np.ndarray) -> np.ndarray:
    """Return the mask [H, W] of the rim of a picture."""
    rim = max(pixels.shape[0] // 24, 1)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[rim:-rim, rim:-rim] = False
    return border


def _interior(mask: np.ndarray) -> np.ndarray:
    """Drop the anti-aliased rim, unless nothing would be left."""
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.any() else mask


def _geometry(scene: Scene, box: tuple[slice, slice], side: int) -> dict[str, float]:
    """Score size and position of the largest object where the caption mentions them."""
    rows, columns = box
    scores = {}
    if scene.size is not None:
        extent = max(rows.stop - rows.start, columns.stop - columns.start) / side
        scores["size"] = _ramp(abs(extent - 2 * render.RADIUS[scene.size]), 0.17, 0.06)
    if scene.position is not None:
        x, y = (columns.start + columns.stop) / (2 * side), (rows.start + rows.stop) / (2 * side)
        along = {"left": 1 - x, "right": x, "top": 1 - y, "bottom": y}[scene.position]
        scores["position"] = _ramp(along, 0.52, 0.64)
    return scores


class Thing(NamedTuple):
    """Describe an object of a picture: its box x1, y1, x2, y2 in pixels, the shape nearest to it, and its colour."""

    box: tuple[int, int, int, int]
    shape: str
    overlap: float  # intersection over union with that shape
    color: str


def find(image: Image.Image) -> list[Thing]:
    """Return the objects of a picture, the largest first, whatever its caption asks for."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    labels, boxes = _objects(pixels, np.median(pixels[_border(pixels)], axis=0))
    found = []
    for number, (rows, columns) in enumerate(boxes, start=1):
        mask = labels == number
        overlap = _overlaps(mask[rows, columns])
        shape = max(overlap, key=overlap.get)
        mean = pixels[_interior(mask)].mean(axis=0)
        color = min(COLORS, key=lambda name: np.linalg.norm(mean - np.asarray(PALETTE[name]) / 255))
        found.append(Thing((columns.start, rows.start, columns.stop, rows.stop), shape, float(overlap[shape]), color))
    return found


def measure(image: Image.Image, scene: Scene) -> dict[str, float]:
    """Score every attribute that the scene's caption mentions, each in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    border = _border(pixels)
    ground = np.median(pixels[border], axis=0)
    scores = {"background": _closeness(pixels[border], scene.background)}

    labels, boxes = _objects(pixels, ground)
    if not boxes:
        absent = ["color", "shape", "count", *(name for name in ("size", "position") if getattr(scene, name))]
        return scores | dict.fromkeys(absent, 0.0)
    shown = range(min(len(boxes), scene.count))
    scores["color"] = _closeness(pixels[_interior((labels > 0) & (labels <= scene.count))], scene.color)
    scores["shape"] = float(np.mean([_shape_score(labels[boxes[i]] == i + 1, scene.shape) for i in shown]))
    scores["count"] = max(0.0, 1 - 0.6 * abs(len(boxes) - scene.count))
    return scores | _geometry(scene, boxes[0], max(pixels.shape[:2]))


class Oracle:
    """Score images of the embedded world exactly; offers the same `score` as every reward model."""

    name = "oracle"

    def attributes(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return a tensor [N] in [0, 1] per attribute, NaN where a prompt does not mention it."""
        measured = [measure(image, parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]
        return {name: torch.tensor([row.get(name, float("nan")) for row in measured]) for name in ATTRIBUTES}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Return the mean over the mentioned attributes, [N] float32 in [0, 1]."""
        columns = list(self.attributes(images, prompts).values())
        return torch.nanmean(torch.stack(columns), dim=0).float()
