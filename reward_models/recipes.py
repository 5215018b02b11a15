"""What a score depends on beside picture and prompt: how pixels are made, and a name for the weights.

A recipe is small and can be sent to other processes, so that pictures are decoded and resized there while the network
runs here. Equal recipes give equal pixels: scorers that share one share the work.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from reward_models.preprocess import (
    OPENAI_MEAN,
    OPENAI_STD,
    PixelSpec,
    clip_pil,
    hps_letterbox,
    spm_tensor_noaa,
    to_tensor,
)

VERSION = 1  # to be raised when a function of preprocess.py gives other pixels: stored scores are then not reused
METHODS = {
    "clip_pil": clip_pil,
    "hps_letterbox": lambda image, spec: hps_letterbox(to_tensor(image), spec),
    "spm_tensor_noaa": lambda image, spec: spm_tensor_noaa(to_tensor(image), spec),
}


@dataclass(frozen=True)
class Recipe:
    """Make pixels [3, size, size] float32 of an upright RGB picture: `preprocess.METHOD(picture, spec)`."""

    method: str  # a key of METHODS
    spec: PixelSpec

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels of a picture."""
        return METHODS[self.method](image, self.spec)

    def __str__(self) -> str:
        colours = (self.spec.mean, self.spec.std)
        others = "" if colours == (OPENAI_MEAN, OPENAI_STD) else f"-{colours}"
        return f"{self.method}-{self.spec.size}{others}-v{VERSION}"


@dataclass(frozen=True)
class JoinedRecipe:
    """Make the pixels of several recipes behind one another, [P] float32."""

    parts: tuple["Recipe | JoinedRecipe", ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixels of a picture."""
        return torch.cat([part(image).flatten() for part in self.parts])

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def weights_digest(state: Mapping[str, Tensor], *more: object) -> str:
    """Hash weights, their names and dtypes, and the text of `more`, to 32 hexadecimal digits.

    The tensors are hashed by four threads, a gigabyte in about a second each.
    """
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_digest, state.values()))
    total = hashlib.blake2b(repr(more).encode(), digest_size=16)
    for name, value, digest in zip(state, state.values(), digests, strict=True):
        total.update(f"\0{name}\0{value.dtype}\0{list(value.shape)}\0".encode() + digest)
    return total.hexdigest()


def _digest(value: Tensor) -> bytes:
    # as bytes: numpy knows no bfloat16
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8) if value.numel() else torch.empty(0)
    return hashlib.blake2b(raw.numpy(), digest_size=16).digest()


def probe_prompts() -> Sequence[str]:
    """Return prompts whose tokens tell vocabularies apart: `weights_digest` takes their ids."""
    return ("a photo of 2 red circles, left of a blue star!", "the quick brown fox jumps over the lazy dog 0123456789")
