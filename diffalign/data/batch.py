"""What a training step receives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Say how B examples are shown this time; all images of an example are treated alike."""

    flips: Tensor  # bool [B], mirrored
    drop_caption: Tensor  # bool [B], with the empty caption
    crops: Tensor | None = None  # [B,2] in [0, 1), where a random crop lies


# Augmentations are drawn from the example ids [B], which are known once the examples are.
Augment = Callable[[Tensor], Augmentation]


class PairEncoder(Protocol):
    """What caching and online encoding need of a backbone. It moves its inputs to its own device."""

    text_columns: tuple[str, ...]  # names of what `encode_prompts` returns; "prompt_embeds" is one of them
    token_columns: tuple[str, ...]  # those [N,L,...] that end in zeros where prompts are shorter: these are not kept
    ignores_padding: bool  # to the bit, whatever number of zeros the token columns end in

    def fingerprint(self) -> str:
        """Return a hash of everything the encodings depend on."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [N,C,h,w], scaled, of images [N,3,H,W] in [0,1]."""

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the columns of N prompts by name, [N,...] each: embeddings, and masks of bools or integers."""


ROW_ALIGNED = ("latent_mean", "latent_std", "sizes")
EXAMPLE_ALIGNED = ("example_ids", "preference", "scores", "weights")


@dataclass(frozen=True)
class PreferenceBatch:
    """Hold B examples of k images as N = k*B rows [image 0 of every example, image 1 of every example, ...].

    A pair is k = 2 with the winner first; a list runs from best to worst; a single labelled image is k = 1. Tensors
    are float32 unless said otherwise.
    """

    example_ids: Tensor  # int64 [B]
    latent_mean: Tensor  # [N,C,h,w], scaled: mean of the VAE's posterior
    latent_std: Tensor  # [N,C,h,w], scaled: its standard deviation
    text: dict[str, Tensor]  # columns [N,...] of the prompts by name: what the model's `encode_prompts` returns
    sizes: Tensor  # [N,6]: original_h, original_w, crop_top, crop_left, target_h, target_w
    preference: Tensor | None  # [B], P(winner preferred); None where the data has plain winners only
    prompts: list[str]  # [N], "" where the caption was dropped
    scores: Tensor | None = None  # [B,k], higher is better; of single images 1 (desirable) or 0
    weights: Tensor | None = None  # [B], what each example counts
    noises: list[str | None] | None = None  # [N], what each image was drawn from (denoising/initial_noise.py)

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def images_per_example(self) -> int:
        """Return k."""
        return len(self.latent_mean) // max(1, len(self))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if isinstance(v, Tensor)}
        text = {name: column.to(device, non_blocking=non_blocking) for name, column in self.text.items()}
        return replace(self, **moved, text=text)

    def winners(self) -> Self:
        """Return the first image of every example only: N = B rows, one score each, no preference."""
        kept = self._with_rows(torch.arange(len(self), device=self.example_ids.device))
        return replace(kept, preference=None, scores=None if self.scores is None else self.scores[:, :1])

    def swapped(self, mask: Tensor) -> Self:
        """Exchange winner and loser of the pairs where `mask` [B] (bool) holds; a preference p becomes 1 - p.

        Raises:
            ValueError: the examples are no pairs, or the mask has another shape.
        """
        pairs = len(self)
        if self.images_per_example != 2:
            raise ValueError(f"Only pairs can be swapped; these examples have {self.images_per_example} image(s).")
        if mask.shape != (pairs,) or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [{pairs}], got {mask.dtype} {list(mask.shape)}.")
        mask = mask.to(self.example_ids.device)
        first = torch.arange(pairs, device=mask.device)
        rows = torch.cat([torch.where(mask, first + pairs, first), torch.where(mask, first, first + pairs)])
        preference, scores = self.preference, self.scores
        if preference is not None:
            preference = torch.where(mask, 1 - preference, preference)
        if scores is not None:
            scores = torch.where(mask[:, None], scores.flip(1), scores)
        return replace(self._with_rows(rows), preference=preference, scores=scores)

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return the examples at these positions, in this order, each with all its images."""
        device = self.example_ids.device
        chosen = torch.as_tensor(indices, device=device)
        if chosen.dtype == torch.bool:
            raise ValueError("select takes positions of examples, not a mask: pass mask.nonzero()[:, 0].")
        chosen = torch.arange(len(self), device=device)[chosen.long()]  # checks the range, resolves negative ones
        rows = torch.cat([chosen + image * len(self) for image in range(self.images_per_example)])
        cut = {name: getattr(self, name)[chosen] for name in EXAMPLE_ALIGNED if getattr(self, name) is not None}
        return replace(self._with_rows(rows), **cut)

    def _with_rows(self, rows: Tensor) -> Self:
        """Take rows of everything that has N of them."""
        cut = {name: getattr(self, name)[rows] for name in ROW_ALIGNED}
        text = {name: column[rows] for name, column in self.text.items()}
        prompts = [self.prompts[row] for row in rows.tolist()] if self.prompts else []
        noises = None if self.noises is None else [self.noises[row] for row in rows.tolist()]
        return replace(self, **cut, text=text, prompts=prompts, noises=noises)


def as_float32(column: Tensor) -> Tensor:
    """Return embeddings in float32, and masks as they are."""
    return column.to(torch.float32) if column.is_floating_point() else column


def sample_latents(batch: PreferenceBatch, posterior_noise: Tensor) -> Tensor:
    """Draw x0 [N,C,h,w] = mean + std * posterior_noise from the VAE's posterior."""
    return batch.latent_mean + batch.latent_std * posterior_noise
