"""The prompts of a rollout and what the denoiser is told about them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.data.visits import masks


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Hold B prompts."""

    texts: list[str]
    ids: Tensor  # [B] int64, a hash of the text and of the draw: what randomness is keyed by
    cond: Conditioning  # of B
    empty: Conditioning  # of 1, the empty prompt

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Tensor) -> "PromptBatch":
        """Return some of the prompts."""
        texts = [self.texts[row] for row in rows.tolist()]
        return PromptBatch(texts, self.ids[rows], self.cond.select(rows), self.empty)

    def copies(self, count: int) -> tuple[list[str], Conditioning]:
        """Return texts and conditioning of count*B rows [all prompts, all prompts again, ...]."""
        rows = torch.arange(len(self), device=self.ids.device).repeat(count)
        return self.texts * count, self.cond.select(rows)


class PromptEncoder:
    """Encode prompts for pictures of one size.

    The empty prompt is what the family's pipeline takes for a missing negative prompt: zeros for SDXL, else "" encoded.
    """

    def __init__(self, backbone: Backbone, resolution: int):
        self.backbone, self.resolution = backbone, resolution
        self._empty: Conditioning | None = None

    def __call__(self, texts: Sequence[str], device: torch.device, shown: Sequence[int] | None = None) -> PromptBatch:
        """Return the prompts with their conditioning on a device; `shown`: as an order served them, `Visit`s too."""
        with torch.no_grad():
            cond = conditioning(self.backbone, texts, self.resolution).to(device)
            if self._empty is None or self._empty.device != device:
                empty = conditioning(self.backbone, [""], self.resolution, zeros=self._empty_is_zero())
                self._empty = empty.to(device)
        ids = torch.tensor([prompt_id(text) for text in texts])
        if shown is not None:
            ids ^= masks(shown)
        return PromptBatch(list(texts), ids.to(device), cond, self._empty)

    def _empty_is_zero(self) -> bool:
        return bool(self.backbone.options.get("force_zeros_for_empty_prompt", self.backbone.family == "sdxl"))


def conditioning(backbone: Backbone, texts: Sequence[str], resolution: int, zeros: bool = False) -> Conditioning:
    """Return what the denoiser is told of N prompts for square pictures; each distinct prompt is encoded once.

    zeros: the text is zeros in the place of the embeddings.
    """
    distinct = list(dict.fromkeys(texts))
    rows = [distinct.index(text) for text in texts]
    columns = {name: column[rows] for name, column in backbone.encode_prompts(distinct).items()}
    if zeros:
        columns = {name: torch.zeros_like(column) for name, column in columns.items()}
    side = float(resolution)
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(texts), 1)
    return backbone.condition(columns, sizes)


def prompt_id(text: str) -> int:
    """Return a hash of a prompt, 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
