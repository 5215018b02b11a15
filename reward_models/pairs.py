"""Preference pairs for reward training: checked, split by prompt, decoded when a batch needs them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from reward_models.errors import ScorerError
from reward_models.preprocess import ImageLike, to_rgb


class RewardPair(NamedTuple):
    """Hold two images of one prompt and the choice between them, as a Pick-a-Pic row."""

    image_0: ImageLike
    image_1: ImageLike
    prompt: str
    label_0: float  # P(image_0 preferred): 1, 0, or 0.5 for a tie
    user: str | None = None  # who chose; read by PAL alone


def checked(items: Iterable[RewardPair | tuple[ImageLike, ImageLike, str, float]]) -> list[RewardPair]:
    """Return the items as pairs; raise ScorerError that names the first unusable one."""
    pairs = []
    for index, item in enumerate(items):
        try:
            pair = RewardPair(*item)
            usable = isinstance(pair.prompt, str) and 0.0 <= pair.label_0 <= 1.0
        except TypeError:
            usable = False
        if not usable:
            raise ScorerError(f"Pair {index} is not (image_0, image_1, prompt, label_0 in [0, 1]): {item!r:.200}")
        pairs.append(pair)
    return pairs


def split_by_prompt(
    pairs: Sequence[RewardPair], fraction: float, seed: int
) -> tuple[list[RewardPair], list[RewardPair]]:
    """Hold out all pairs of `fraction` of the prompts (at least one), so that no prompt is on both sides."""
    prompts = sorted({pair.prompt for pair in pairs})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {prompts[index] for index in order[: max(1, round(fraction * len(prompts)))]}
    if len(held_out) == len(prompts):
        raise ScorerError(
            f"Cannot hold out a part of {len(prompts)} prompt(s) for validation. Give validation pairs, "
            "or set validation_fraction=0 to train without."
        )
    return [pair for pair in pairs if pair.prompt not in held_out], [pair for pair in pairs if pair.prompt in held_out]


class PairPixels(Dataset):
    """Decode and preprocess pairs: (pixels_0, pixels_1, prompt, label_0)."""

    def __init__(self, pairs: Sequence[RewardPair], preprocess: Callable[[Image.Image], Tensor]):
        self.pairs = pairs
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str, Tensor]:
        pair = self.pairs[index]
        try:
            pixels = [self.preprocess(to_rgb(image)) for image in (pair.image_0, pair.image_1)]
        except ScorerError as error:
            raise ScorerError(f'Pair {index} ("{pair.prompt[:60]}"): {error}') from None
        return *pixels, pair.prompt, torch.tensor(float(pair.label_0))


def index_batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield `steps` batches from one permutation of `count` after the other; all are full unless there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]
