"""What every scorer is: images and prompts in, one number per image out, and a card that says what it means."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reward_models.errors import ScorerError
from reward_models.preprocess import ImageLike, to_rgb
from reward_models.recipes import JoinedRecipe, Recipe, probe_prompts, weights_digest

__all__ = ["ImageLike", "Scorer", "ScorerCard", "ScorerError"]
UNPUBLISHED = "none published"  # stands in a card for the weights of a scorer that everybody makes for himself
Prompts = str | Sequence[str] | None  # one for all images, one an image, or none where a scorer reads none
BatchSize = int | Literal["auto"] | None  # "auto": as much as fits; None: as before
GROWING = ("cuda",)  # where a larger batch is faster, and running out of memory is an exception and no kill
LARGEST_BATCH = 1024

_log = logging.getLogger("reward_models")


@dataclass(frozen=True, kw_only=True)
class ScorerCard:
    """Say what a score means and where it comes from."""

    name: str
    weights: str  # Hugging Face id of the official weights, "owner/name" or "owner/name/file"; or UNPUBLISHED
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

    A subclass lists its `cards`, loads and saves its weights and defines the steps: `recipe` for pictures or
    `preprocess_tensor` for differentiable images, `image_features` for what needs no prompt, `score_features`.
    """

    cards: ClassVar[tuple[ScorerCard, ...]] = ()  # one for each name this class answers to

    def __init__(self, card: ScorerCard, module: nn.Module, *, source: str, batch_size: int = 32):
        self.card = card
        self.module = module.eval().requires_grad_(False)
        self.source = source  # where the weights came from
        self.batch_size = batch_size
        self._grows = False  # double the batch until memory runs out
        self.cut_prompts: dict[str, int] = {}  # prompts seen that were too long, with their number of tokens

    @classmethod
    @abstractmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype) -> Self:
        """Load weights from a file, a folder or a Hugging Face id; raise ScorerError when they do not fit."""

    @property
    @abstractmethod
    def recipe(self) -> Recipe | JoinedRecipe:
        """Return how a picture becomes the network's pixels, exactly as in the official code."""

    @abstractmethod
    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return the network's pixels [N, 3, h, w] for images [N, 3, H, W] in [0, 1], differentiably."""

    @abstractmethod
    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of the features of N images for N prompts, differentiably."""

    @abstractmethod
    def save(self, directory: str | Path) -> Path:
        """Write a folder of safetensors in the scorer's official layout that `load` reads, and return it."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return what the network makes of pixels [N, ...] alone, differentiably; computed once for many prompts."""
        return pixels

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the network's pixels, as a rule [3, h, w], float32, for an RGB picture."""
        return self.recipe(image)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has before it is cut; a scorer that reads no prompt counts none."""
        return [0] * len(prompts)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of preprocessed pixels [N, 3, h, w], differentiably."""
        return self.score_features(self.image_features(pixels), prompts)

    @property
    def name(self) -> str:
        """Return the name the scorer was loaded by."""
        return self.card.name

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.module.parameters()).device

    @property
    def text_length(self) -> int | None:
        """Return the number of tokens a prompt is cut to; None when the prompt is not read."""
        return self.card.text_length

    @property
    def preference_scale(self) -> float:
        """Return what a difference of scores is multiplied by to become the logit of a preference."""
        return 1.0

    @property
    def identity(self) -> str:
        """Return a hash of what a score depends on beside picture and prompt: weights, dtype, pixels, tokens."""
        tokenize = getattr(self, "tokenize", None)
        tokens = tokenize(probe_prompts()) if tokenize else ()
        ids = [part.tolist() for part in (tokens if isinstance(tokens, tuple) else (tokens,))]
        return weights_digest(self.module.state_dict(), self.name, str(self.recipe), ids)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights and return the scorer."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def score(
        self, images: ImageLike | Iterable[ImageLike], prompts: Prompts = None, *, batch_size: BatchSize = None
    ) -> Tensor:
        """Return the scores [N] float32 on the CPU; higher is better, on the scale of `card`.

        Args:
            images: one image or N, each in any form that `preprocess.to_rgb` reads.
            prompts: N prompts, or one for all images; may be left out where the scorer reads none.
            batch_size: images at a time from now on. "auto" doubles it on a GPU until memory runs out, up to 1024, and
                keeps what fits. A number that does not fit is halved. It changes scores by rounding alone.

        Raises:
            ScorerError: for an unreadable image, numbers that do not match, or a score that is not finite.
        """
        self.set_batch_size(batch_size)
        images = listed(images)
        prompts = self._prompts_for(len(images), prompts)
        # images are opened batch by batch, so a list of paths never lies in memory at once
        scores = self._batched(len(images), lambda part: self.score_pixels(self.pixels(images[part]), prompts[part]))
        return self._checked(scores.float().cpu())

    @torch.no_grad()
    def score_prepared(self, pixels: Tensor, prompts: Prompts = None) -> Tensor:
        """Return the scores [N] float32 on the CPU of pixels [N, ...] that `recipe` has made, maybe elsewhere.

        Raises:
            ScorerError: as `score`.
        """
        prompts = self._prompts_for(len(pixels), prompts)
        scores = self._batched(len(pixels), lambda part: self.score_pixels(pixels[part], prompts[part]).float().cpu())
        return self._checked(scores)

    def set_batch_size(self, batch_size: BatchSize) -> None:
        """Take so many images at a time from now on; see `score`. Raises ScorerError for less than 1."""
        if batch_size is None:
            return
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ScorerError(f'batch_size must be a whole number from 1 on or "auto", got {batch_size!r}.')
        self._grows = batch_size == "auto" and self.device.type in GROWING
        self.batch_size = self.batch_size if batch_size == "auto" else batch_size

    @torch.no_grad()
    def score_groups(self, groups: Iterable[tuple[str, Iterable[ImageLike]]]) -> list[Tensor]:
        """Return the scores [n] float32 of each (prompt, its n images): groups may differ in size, none is padded."""
        groups = [(prompt, listed(images)) for prompt, images in groups]
        sizes = [len(images) for _, images in groups]
        every = [image for _, images in groups for image in images]
        scores = self.score(every, [prompt for prompt, images in groups for _ in images])
        return list(scores.split(sizes)) if sizes else []

    @torch.no_grad()
    def score_matrix(self, images: Iterable[ImageLike], prompts: Sequence[str]) -> Tensor:
        """Return the scores [M, N] float32 of M images for each of N prompts; each image is decoded once."""
        images, prompts = listed(images), [prompts] if isinstance(prompts, str) else list(prompts)
        if not images or not prompts:
            return torch.empty(len(images), len(prompts))

        def rows(part: slice) -> Tensor:
            features = self.image_features(self.pixels(images[part]))
            columns = [self.score_features(features, [prompt] * len(features)) for prompt in prompts]
            return torch.stack(columns, dim=1).float().cpu()

        return self._checked(self._batched(len(images), rows))

    def compare(self, images_a: Iterable[ImageLike], images_b: Iterable[ImageLike], prompts: Prompts = None) -> Tensor:
        """Return P(a preferred to b) [N] float32: sigmoid(preference_scale * (score_a - score_b))."""
        images_a, images_b = listed(images_a), listed(images_b)
        if len(images_a) != len(images_b):
            raise ScorerError(f"compare needs as many images on both sides, got {len(images_a)} and {len(images_b)}.")
        prompts = self._prompts_for(len(images_a), prompts)
        score_a, score_b = self.score([*images_a, *images_b], [*prompts, *prompts]).chunk(2)
        return torch.sigmoid(self.preference_scale * (score_a - score_b))

    def score_tensor(self, images: Tensor, prompts: Prompts = None) -> Tensor:
        """Return the scores [N] float32 of images [N, 3, H, W] in [0, 1] on their device, with gradients to them.

        Equals `score` up to the 8-bit rounding of pictures and, where the official preprocessing resizes with PIL,
        the difference between the two filters. Runs as one batch: the caller decides what fits into memory.
        """
        pixels = self.preprocess_tensor(self._tensor_images(images))
        return self.score_pixels(pixels, self._prompts_for(len(images), prompts)).to(images.device)

    def pixels(self, images: Iterable[ImageLike]) -> Tensor:
        """Return the network's pixels [N, 3, h, w] float32 of images in any form, on the CPU."""
        return torch.stack([self.preprocess(to_rgb(image)) for image in images])

    def _tensor_images(self, images: Tensor) -> Tensor:
        """Return images [N, 3, H, W] as float32 on the network's device; raise ScorerError for other tensors."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ScorerError(
                f"score_tensor takes floating-point images [N, 3, H, W] in [0, 1], got {list(images.shape)} of "
                f"{images.dtype}. Use score for images in other forms."
            )
        return images.to(self.device, torch.float32)

    def _prompts_for(self, count: int, prompts: Prompts) -> list[str]:
        if prompts is None and self.text_length is not None:
            raise ScorerError(f"{self.name} reads the prompt: give one an image, or a single string for all.")
        if prompts is None or isinstance(prompts, str):
            return [prompts or ""] * count
        prompts = list(prompts)
        if len(prompts) != count:
            raise ScorerError(
                f"Got {count} images and {len(prompts)} prompts. Give one prompt an image, or a single string for all."
            )
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ScorerError(f"A prompt must be a string, got {wrong[0]!r}.")
        if wrong := [prompt for prompt in prompts if prompt != prompt.encode(errors="ignore").decode()]:
            raise ScorerError(f"A prompt holds half of a character, which is no text: {wrong[0]!r}. Take it out.")
        return prompts

    def _report_cut(self, prompts: Sequence[str]) -> None:
        """Remember prompts that are longer than the network reads in `cut_prompts`, and log each of them once."""
        counts = dict(zip(prompts, self.token_counts(prompts), strict=True))
        cut = {text: n for text, n in counts.items() if n > self.text_length and text not in self.cut_prompts}
        if cut:
            self.cut_prompts.update(cut)
            text, tokens = max(cut.items(), key=lambda item: item[1])
            _log.warning(
                '%s reads %d tokens of a prompt, end token included: %d prompt(s) are cut, the longest "%.60s..." '
                "with %d tokens. They are listed in cut_prompts.",
                *(self.name, self.text_length, len(cut), text, tokens),
            )

    def _checked(self, scores: Tensor) -> Tensor:
        """Return the scores; raise ScorerError with the place of the first that is not finite."""
        if not torch.isfinite(scores).all():
            index = (~torch.isfinite(scores)).nonzero()[0].tolist()
            raise ScorerError(f"{self.name} gave image {index[0]} the score {scores[*index].item()}. {self._nan_hint}")
        return scores

    @property
    def _nan_hint(self) -> str:
        return "Load the scorer with dtype=torch.float32; if it persists, its weights are damaged."

    def _batched(self, count: int, evaluate: Callable[[slice], Tensor]) -> Tensor:
        """Concatenate `evaluate` over slices of `batch_size`, halving it for good where memory runs out."""
        parts, start = [], 0
        while start < count:
            size = self.batch_size
            try:
                parts.append(evaluate(slice(start, start + size)))
            except RuntimeError as error:
                if size == 1 or not _is_out_of_memory(error):
                    raise
                self.batch_size, self._grows = size // 2, False
                torch.cuda.empty_cache()
                continue
            start += size
            if self._grows and start <= count:
                self.batch_size = min(2 * size, LARGEST_BATCH)
        return torch.cat(parts) if parts else torch.empty(0)


def listed(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Return the images as a list; a single one, in whatever form, becomes a list of one."""
    is_batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if not is_batch and isinstance(images, ImageLike | bytearray):
        return [images]
    return list(images)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the CPU's wording
