"""What worker processes do: read, hash and decode pictures, and make the pixels that scorers still want."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.fingerprints import digest_bytes
from diffalign.data.pairs import MAX_ASPECT_RATIO
from diffalign.data.tars import Span
from diffalign.jobs.scoring.items import Item
from reward_models import pictures

KEY = "S32"  # hash of the encoded picture, hash of the prompt; 16 bytes each
Recipe = Callable[[Image.Image], Tensor] | None  # None: the scorer wants the picture itself


@dataclass
class Prepared:
    """Hold a chunk of n pictures, read and as far as anybody wants it decoded."""

    items: list[Item]  # without their bytes
    keys: np.ndarray  # [n] KEY; empty where the picture is broken
    wanted: np.ndarray  # [n, scorers] bool: not known yet
    faults: dict[int, str]  # by row
    made: dict[Any, tuple[list[int], Tensor | list[np.ndarray]]] = field(default_factory=dict)  # rows, by recipe

    def of(self, recipe: Recipe, rows: Sequence[int]) -> Tensor | list[Image.Image]:
        """Return what a recipe has made of these rows: pixels [len(rows), ...], or pictures for None."""
        having, made = self.made[recipe]
        if recipe is None:
            return [Image.fromarray(made[having.index(row)]) for row in rows]
        return made if having == list(rows) else made[[having.index(row) for row in rows]]


@dataclass(frozen=True)
class Decoder:
    """Turn a chunk of items into `Prepared`; what DataLoader calls a data set, indexed by chunks.

    recipes: of each scorer.
    known: the keys that each scorer has scored before, sorted; those pictures are hashed but not decoded.
    """

    recipes: tuple[Recipe, ...]
    known: tuple[np.ndarray, ...]

    def __getitem__(self, items: list[Item]) -> Prepared:
        faults = {row: item.fault for row, item in enumerate(items) if item.fault}
        contents: list[bytes] = [b""] * len(items)
        keys = np.zeros(len(items), dtype=KEY)
        for row, item in enumerate(items):
            if row not in faults:
                try:
                    contents[row] = read(item)
                    keys[row] = digest_bytes(contents[row]) + digest_bytes(item.prompt.encode())
                except (OSError, pictures.PictureError) as error:
                    faults[row] = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        wanted = np.stack([~contains(known, keys) for known in self.known], axis=1)
        wanted[list(faults)] = False
        prepared = Prepared([item._replace(data=None) for item in items], keys, wanted, faults)
        self._decode(prepared, contents)
        return prepared

    def _decode(self, prepared: Prepared, contents: list[bytes]) -> None:
        made: dict[Any, tuple[list[int], list[Any]]] = {recipe: ([], []) for recipe in self.recipes}
        for row in np.flatnonzero(prepared.wanted.any(axis=1)).tolist():
            image = decode(contents[row])
            if isinstance(image, str):
                prepared.faults[row], prepared.wanted[row] = image, False
                continue
            for recipe in {recipe for recipe, w in zip(self.recipes, prepared.wanted[row], strict=True) if w}:
                made[recipe][0].append(row)
                made[recipe][1].append(np.asarray(image) if recipe is None else recipe(image))
        for recipe, (rows, values) in made.items():
            if rows:
                prepared.made[recipe] = rows, values if recipe is None else torch.stack(values)


def read(item: Item) -> bytes:
    """Return the encoded picture; raise OSError or PictureError."""
    if isinstance(item.data, bytes):
        return item.data
    return item.data.read() if isinstance(item.data, Span) else pictures.read(item.data)


def decode(content: bytes) -> Image.Image | str:
    """Return an upright RGB picture, or why it cannot be decoded."""
    try:
        image = pictures.decode(content)
    except pictures.PictureError as error:
        return str(error)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        return f"it is {image.width}x{image.height}, too thin to be resized"
    return image


def contains(ordered: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return which of `keys` [n] are among the sorted keys [m], bool [n]."""
    if not len(ordered):
        return np.zeros(len(keys), dtype=bool)
    places = np.searchsorted(ordered, keys).clip(max=len(ordered) - 1)
    return ordered[places] == keys
