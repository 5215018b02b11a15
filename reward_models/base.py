"""What every scorer is: images and prompts in, one number per image out, and a card that says what it means."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reward_models.errors import ScorerError
from reward_models.preprocess import ImageLike, to_rgb

__all__ = ["ImageLike", "Scorer", "ScorerCard", "ScorerError"]


@dataclass(frozen=True, kw_only=True)
class ScorerCard:
    """Say what a score means and where it comes from."""

    name: str
    weights: str  # Hugging Face id of the official weights, "owner/name" or "owner/name/file"
    preprocessing: str
    text_length: int | None  # tokens a prompt is cut to; None when the prompt is not read
    formula: str
    scale: str
    usual_range: tuple[float, float]
    licence: str
    traps: tuple[str, ...]
    source: str  # repository and commit the implementation was checked against


class Scorer(ABC):
    """Score images for prompts.

    A subclass lists its `cards`, loads its weights and defines three steps: `preprocess` for pictures,
    `preprocess_tensor` for differentiable images, and `score_pixels`, the network.
    """

    cards: ClassVar[tuple[ScorerCard, ...]] = ()  # one for each name this class answers to

    def __init__(self, card: ScorerCard, module: nn.Module, *, source: str, batch_size: int = 32):
        self.card = card
        self.module = module.eval().requires_grad_(False)
        self.source = source  # where the weights came from
        self.batch_size = batch_size

    @classmethod
    @abstractmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype) -> Self:
        """Load weights from a file, a folder or a Hugging Face id; raise ScorerError when they do not fit."""

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the network's pixels [3, h, w] float32 for an RGB picture, exactly as the official code."""

    @abstractmethod
    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return the network's pixels [N, 3, h, w] for images [N, 3, H, W] in [0, 1], differentiably."""

    @abstractmethod
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of preprocessed pixels [N, 3, h, w], differentiably."""

    @property
    def name(self) -> str:
        """Return the name the scorer was loaded by."""
        return self.card.name

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.module.parameters()).device

    @property
    def preference_scale(self) -> float:
        """Return what a difference of scores is multiplied by to become the logit of a preference."""
        return 1.0

    def to(self, device: str | torch.device) -> Self:
        """Move the weights and return the scorer."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def score(self, images: ImageLike | Iterable[ImageLike], prompts: str | Sequence[str]) -> Tensor:
        """Return the scores [N] float32 on the CPU; higher is better, on the scale of `card`.

        Args:
            images: one image or N, each in any form that `preprocess.to_rgb` reads.
            prompts: N prompts, or one for all images.

        Raises:
            ScorerError: for an unreadable image, numbers that do not match, or a score that is not finite.
        """
        images = listed(images)
        prompts = _prompts_for(len(images), prompts)
        # images are opened batch by batch, so a list of paths never lies in memory at once
        scores = self._batched(len(images), lambda part: self.score_pixels(self.pixels(images[part]), prompts[part]))
        scores = scores.float().cpu()
        if not torch.isfinite(scores).all():
            index = int((~torch.isfinite(scores)).nonzero()[0])
            raise ScorerError(
                f"{self.name} gave image {index} the score {scores[index].item()}. "
                "Load the scorer with dtype=torch.float32; if it persists, its weights are damaged."
            )
        return scores

    def compare(
        self, images_a: Iterable[ImageLike], images_b: Iterable[ImageLike], prompts: str | Sequence[str]
    ) -> Tensor:
        """Return P(a preferred to b) [N] float32: sigmoid(preference_scale * (score_a - score_b))."""
        images_a, images_b = listed(images_a), listed(images_b)
        if len(images_a) != len(images_b):
            raise ScorerError(f"compare needs as many images on both sides, got {len(images_a)} and {len(images_b)}.")
        prompts = _prompts_for(len(images_a), prompts)
        score_a, score_b = self.score([*images_a, *images_b], [*prompts, *prompts]).chunk(2)
        return torch.sigmoid(self.preference_scale * (score_a - score_b))

    def score_tensor(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of images [N, 3, H, W] in [0, 1] on their device, with gradients to them.

        Equals `score` up to the 8-bit rounding of pictures and, where the official preprocessing resizes with PIL,
        the difference between the two filters. Runs as one batch: the caller decides what fits into memory.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ScorerError(
                f"score_tensor takes floating-point images [N, 3, H, W] in [0, 1], got {list(images.shape)} of "
                f"{images.dtype}. Use score for images in other forms."
            )
        pixels = self.preprocess_tensor(images.to(self.device, torch.float32))
        return self.score_pixels(pixels, _prompts_for(len(images), prompts)).to(images.device)

    def score_matrix(self, images: Iterable[ImageLike], prompts: Sequence[str]) -> Tensor:
        """Return the scores [M, N] float32 of M images for each of N prompts."""
        images, prompts = listed(images), [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            return torch.empty(len(images), 0)
        return torch.stack([self.score(images, prompt) for prompt in prompts], dim=1)

    def pixels(self, images: Iterable[ImageLike]) -> Tensor:
        """Return the network's pixels [N, 3, h, w] float32 of images in any form, on the CPU."""
        return torch.stack([self.preprocess(to_rgb(image)) for image in images])

    def _batched(self, count: int, evaluate: Callable[[slice], Tensor]) -> Tensor:
        """Concatenate `evaluate` over slices of `batch_size`, halving it for good where the GPU runs out of memory."""
        parts, start = [], 0
        while start < count:
            try:
                parts.append(evaluate(slice(start, start + self.batch_size)))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                continue
            start += self.batch_size
        return torch.cat(parts) if parts else torch.empty(0)


def listed(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Return the images as a list; a single one, in whatever form, becomes a list of one."""
    is_batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if not is_batch and isinstance(images, ImageLike | bytearray):
        return [images]
    return list(images)


def _prompts_for(count: int, prompts: str | Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        return [prompts] * count
    prompts = list(prompts)
    if len(prompts) != count:
        raise ScorerError(
            f"Got {count} images and {len(prompts)} prompts. Give one prompt an image, or a single string for all."
        )
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ScorerError(f"A prompt must be a string, got {wrong[0]!r}.")
    return prompts
