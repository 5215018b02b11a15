"""What a training step receives."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Say how B pairs are shown this time; both images of a pair are treated alike."""

    flips: Tensor  # bool [B], mirrored
    drop_caption: Tensor  # bool [B], with the empty caption
    crops: Tensor | None = None  # [B,2] in [0, 1), where a random crop lies


# Augmentations are drawn from the example ids [B], which are known once the pairs are.
Augment = Callable[[Tensor], Augmentation]


class PairEncoder(Protocol):
    """What caching and online encoding need of a backbone. It moves its inputs to its own device."""

    def fingerprint(self) -> str:
        """Return a hash of everything the encodings depend on."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [N,C,h,w], scaled, of images [N,3,H,W] in [0,1]."""

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return prompt_embeds [N,L,D] and pooled_prompt_embeds [N,P] or None."""


@dataclass(frozen=True)
class PairBatch:
    """Hold B pairs as N = 2B rows ordered [w_1..w_B, l_1..l_B]; tensors are float32 unless said otherwise."""

    example_ids: Tensor  # int64 [B]
    latent_mean: Tensor  # [N,C,h,w], scaled: mean of the VAE's posterior
    latent_std: Tensor  # [N,C,h,w], scaled: its standard deviation
    prompt_embeds: Tensor  # [N,L,D]
    pooled_prompt_embeds: Tensor | None  # [N,P]
    sizes: Tensor  # [N,6]: original_h, original_w, crop_top, crop_left, target_h, target_w
    preference: Tensor | None  # [B], P(winner preferred); None where the data has plain winners only
    prompts: list[str]  # [B], "" where the caption was dropped

    def __len__(self) -> int:
        return len(self.example_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def winners(self) -> Self:
        """Return the chosen images only: N = B rows, no preference."""
        rows = len(self)
        names = ("latent_mean", "latent_std", "prompt_embeds", "pooled_prompt_embeds", "sizes")
        cut = {name: getattr(self, name)[:rows] for name in names if getattr(self, name) is not None}
        return replace(self, **cut, preference=None)


def sample_latents(batch: PairBatch, posterior_noise: Tensor) -> Tensor:
    """Draw x0 [N,C,h,w] = mean + std * posterior_noise from the VAE's posterior."""
    return batch.latent_mean + batch.latent_std * posterior_noise
