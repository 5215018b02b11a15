"""Scorers that compare one image embedding with one prompt embedding."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import ImageLike, Scorer, ScorerCard, listed
from reward_models.preprocess import PixelSpec

CACHED_PROMPTS = 8192  # 32 MiB of ViT-H embeddings


class TwoTowerScorer(Scorer):
    """Score by cosine: <e_image, e_text>, both of unit length, times exp(logit_scale) where `is_scaled`.

    The towers run in the dtype of the weights; normalisation, product and logit_scale are float32, because
    fp16 or bf16 there quantises scores into artificial ties.
    """

    is_scaled: ClassVar[bool]

    def __init__(self, card: ScorerCard, module: nn.Module, spec: PixelSpec, *, source: str, batch_size: int = 32):
        super().__init__(card, module, source=source, batch_size=batch_size)
        self.spec = spec
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [N, L] int64 on the CPU, cut to the text length with the end token kept."""

    @abstractmethod
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return the image embeddings [N, D] of the network, not normalised, for pixels in its dtype."""

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the text embeddings [N, D] of the network, not normalised."""

    @abstractmethod
    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image tower's parameters from the pixels on: embeddings, each block, projection."""

    @abstractmethod
    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text tower's parameters up to the last block: embeddings, each block."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the towers; logit_scale is float32 in any case."""
        return self.image_groups()[0][0].dtype

    @property
    def logit_scale(self) -> Tensor:
        """Return exp(logit_scale), float32 []."""
        return self.module.logit_scale.float().exp().reshape(())

    @property
    def preference_scale(self) -> float:
        """Return what turns a difference of scores into the logit the network was trained with."""
        return 1.0 if self.is_scaled else float(self.logit_scale)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights and return the scorer."""
        self.clear_cache()
        return super().to(device)

    def clear_cache(self) -> None:
        """Forget the prompt embeddings; needed after changing the weights."""
        self._text_cache.clear()

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Return unit image embeddings [N, D] float32, with gradients."""
        return F.normalize(self.embed_pixels(pixels.to(self.device, self.dtype)).float(), dim=-1)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return unit text embeddings [N, D] float32, with gradients and without the cache."""
        return F.normalize(self.embed_tokens(self.tokenize(prompts).to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def cached_text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return unit text embeddings [N, D] float32 without gradients; each distinct prompt is embedded once."""
        known = {prompt: self._text_cache[prompt] for prompt in prompts if prompt in self._text_cache}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        self._report_cut(missing)
        embeddings = self._batched(len(missing), lambda part: self.text_embeddings(missing[part]))
        known.update(zip(missing, embeddings, strict=True))
        self._text_cache.update(known)
        for prompt in known:
            self._text_cache.move_to_end(prompt)
        while len(self._text_cache) > CACHED_PROMPTS:
            self._text_cache.popitem(last=False)
        return torch.stack([known[prompt] for prompt in prompts])

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """Return the score of a cosine: itself, or times exp(logit_scale) where `is_scaled`."""
        return cosine * self.logit_scale if self.is_scaled else cosine

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return unit image embeddings [N, D] float32 of preprocessed pixels, with gradients."""
        return self.image_embeddings(pixels)

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of unit image embeddings [N, D], with gradients to them."""
        return self.from_cosine((features * self.cached_text_embeddings(prompts)).sum(dim=-1))

    @torch.no_grad()
    def score_matrix(self, images: Iterable[ImageLike], prompts: Sequence[str]) -> Tensor:
        """Return the scores [M, N] float32 of M images for each of N prompts; each is embedded once."""
        images, prompts = listed(images), [prompts] if isinstance(prompts, str) else list(prompts)
        if not images or not prompts:
            return torch.empty(len(images), len(prompts))
        embeddings = self._batched(len(images), lambda part: self.image_features(self.pixels(images[part])))
        return self._checked(self.from_cosine(embeddings @ self.cached_text_embeddings(prompts).T).cpu())
