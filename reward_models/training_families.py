"""What differs between scorers in training: which weights move, what a batch is, and the losses of its pairs."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reward_models.base import Scorer
from reward_models.errors import ScorerError
from reward_models.image_reward import ImageReward
from reward_models.losses import example_weights, hps_losses, pair_losses, pickscore_losses
from reward_models.pairs import PairPixels, RewardPair
from reward_models.pal import Pal
from reward_models.step_aware import StepAware
from reward_models.training_recipes import RewardRecipe
from reward_models.two_tower import TwoTowerScorer

# (pairs [B], visit, timestep or None) -> pictures [B,3,H,W] in [0,1] of both sides (of a `LatentScorer` noisy latents),
# timesteps [B]. `visit` counts how often the pairs were seen; without a timestep the callable draws one a pair.
Pictures = Callable[[Sequence[RewardPair], int, int | None], tuple[Tensor, Tensor, Tensor]]


@runtime_checkable
class LatentScorer(Protocol):
    """Judge noisy latents; its network is not part of this package."""

    validated_at: Sequence[int]  # timesteps
    module: nn.Module  # all that is trained
    device: torch.device
    batch_size: int
    logit_scale: Tensor  # what a cosine is multiplied by

    def embed(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit embeddings [N, D] float32 of latents [N, C, h, w] and of their prompts, with gradients."""

    def save(self, directory: Path) -> Path:
        """Write the weights and return the folder."""


class Batch(NamedTuple):
    """Hold B pairs as the network sees them."""

    image_0: Tensor  # [B,3,h,w]
    image_1: Tensor
    prompts: list[str]
    label_0: Tensor  # [B]
    users: list[str | None]
    timesteps: Tensor | None = None  # [B]

    def part(self, start: int, size: int) -> "Batch":
        """Return `size` pairs from `start` on."""
        return Batch(*(None if column is None else column[start : start + size] for column in self))


def _stay(_: int) -> None:
    """In a worker: a signal to stop that reaches the whole group is for the parent, which finishes its step first."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Family:
    """Train a scorer of two towers by the cosines of unit embeddings.

    A subclass says what is different: `trained` parameters, `images` of a batch, `losses` [B] and `scores` [B], [B].
    """

    def __init__(self, scorer: Scorer, recipe: RewardRecipe):
        self.scorer, self.recipe = scorer, recipe

    def unfreeze(self) -> None:
        """Require gradients of the weights that the recipe trains, and of no others."""
        scorer, recipe = self.scorer, self.recipe
        scorer.module.requires_grad_(True)
        image, text = scorer.image_groups(), scorer.text_groups()
        if recipe.unlocked_image_groups is not None:
            _freeze(image[: max(0, len(image) - recipe.unlocked_image_groups)])
        if recipe.unlocked_text_layers is not None:  # the embeddings (the first group) freeze in any case
            _freeze(text[: max(0, len(text) - recipe.unlocked_text_layers)] or text[:1])

    def batches(self, pairs: Sequence[RewardPair], order: Sequence[tuple[int, list[int]]]) -> Iterator[Batch]:
        """Yield the batches of `order`, a list of (visit, positions); pictures are decoded as they are needed."""
        loader = DataLoader(
            PairPixels(pairs, self.scorer.preprocess),
            batch_sampler=[positions for _, positions in order],
            num_workers=self.recipe.num_workers,
            worker_init_fn=_stay,
            generator=torch.Generator(),  # its own keeps the loader from drawing from the global one
        )
        for (_, positions), (image_0, image_1, prompts, label_0) in zip(order, loader, strict=True):
            yield Batch(image_0, image_1, list(prompts), label_0, [pairs[index].user for index in positions])

    def validation(self, pairs: Sequence[RewardPair], size: int) -> Iterator[tuple[int | None, Batch]]:
        """Yield batches of all pairs, each with the timestep it stands for, None where there are no such things."""
        starts = range(0, len(pairs), size)
        order = [(0, list(range(start, min(start + size, len(pairs))))) for start in starts]
        yield from ((None, batch) for batch in self.batches(pairs, order))

    def losses(self, batch: Batch) -> Tensor:
        """Return the losses [B], with gradients."""
        scorer, recipe = self.scorer, self.recipe
        with self.autocast():
            image_0, image_1, text = self.embeddings(batch)
        label_0 = batch.label_0.to(text.device, torch.float32)
        if recipe.loss == "pickscore":
            arguments = {"in_batch_negatives": recipe.in_batch_negatives}
            return pickscore_losses(image_0, image_1, text, scorer.logit_scale, label_0, **arguments)
        return hps_losses(image_0, image_1, text, scorer.logit_scale, label_0)

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the scores [B] of both sides."""
        image_0, image_1, text = self.embeddings(batch)
        return (image_0 * text).sum(-1), (image_1 * text).sum(-1)

    def autocast(self) -> torch.autocast:
        """Return the precision of the towers; products and losses stay float32."""
        return torch.autocast(self.scorer.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16)

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings [B, D] of both sides and of the prompts."""
        return *self.image_embeddings(batch).chunk(2), self.scorer.text_embeddings(batch.prompts)

    def image_embeddings(self, batch: Batch) -> Tensor:
        """Return unit embeddings [2B, D] of all first sides and then all second ones."""
        return self.scorer.image_embeddings(torch.cat([batch.image_0, batch.image_1]))


class StepAwareFamily(Family):
    """Train by what one denoising step predicts from noised pictures; `pictures` makes them (SPO)."""

    def __init__(self, scorer: StepAware, recipe: RewardRecipe, pictures: Pictures, validated_at: Sequence[int]):
        super().__init__(scorer, recipe)
        self.pictures, self.validated_at = pictures, validated_at

    def batches(self, pairs: Sequence[RewardPair], order: Sequence[tuple[int, list[int]]]) -> Iterator[Batch]:
        """Yield batches of predictions at drawn timesteps."""
        for visit, positions in order:
            yield self._batch([pairs[index] for index in positions], visit, None)

    def validation(self, pairs: Sequence[RewardPair], size: int) -> Iterator[tuple[int | None, Batch]]:
        """Yield all pairs at each timestep of `validated_at`."""
        for timestep in self.validated_at:
            for start in range(0, len(pairs), size):
                yield timestep, self._batch(pairs[start : start + size], 0, timestep)

    def image_embeddings(self, batch: Batch) -> Tensor:
        """Return unit embeddings [2B, D] at the timesteps of the batch."""
        pixels = torch.cat([batch.image_0, batch.image_1]).to(self.scorer.device)
        times = torch.cat([batch.timesteps, batch.timesteps]).to(self.scorer.device)
        return F.normalize(self.scorer.embed_pixels(pixels, times).float(), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return what the network sees of what `pictures` makes."""
        return self.scorer.preprocess_tensor(images)

    def _batch(self, pairs: Sequence[RewardPair], visit: int, timestep: int | None) -> Batch:
        image_0, image_1, times = self.pictures(pairs, visit, timestep)
        pixels = (self.preprocess(image) for image in (image_0, image_1))
        labels = torch.tensor([float(pair.label_0) for pair in pairs])
        return Batch(*pixels, [pair.prompt for pair in pairs], labels, [pair.user for pair in pairs], times)


class LatentFamily(StepAwareFamily):
    """Train a judge of noisy latents, which reads latent and prompt together (LPO); `pictures` makes the latents."""

    def __init__(self, scorer: LatentScorer, recipe: RewardRecipe, pictures: Pictures):
        if recipe.in_batch_negatives:
            raise ScorerError("in_batch_negatives needs latents that are embedded without a prompt. Set it to False.")
        super().__init__(scorer, recipe, pictures, scorer.validated_at)

    def unfreeze(self) -> None:
        """Train all weights of the scorer's module."""
        self.scorer.module.requires_grad_(True)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return the latents as they are."""
        return images

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings [B, D] of both sides and of the prompts, each side seen with its prompt."""
        latents, times = torch.cat([batch.image_0, batch.image_1]), batch.timesteps.repeat(2)
        device = self.scorer.device
        images, texts = self.scorer.embed(latents.to(device), [*batch.prompts, *batch.prompts], times.to(device))
        return *images.chunk(2), texts[: len(batch.prompts)]


class ImageRewardFamily(Family):
    """Train by -log sigmoid(reward_w - reward_l) of raw rewards; the first layers of both towers stay as they are."""

    def unfreeze(self) -> None:
        """Freeze the first int(share * L) layers of each tower, embeddings excepted (fix_rate of the official code)."""
        module, share = self.scorer.module, self.recipe.frozen_share
        module.requires_grad_(True)
        for layers in (module.vision.encoder.layers, module.text.encoder.layer):
            _freeze([list(layer.parameters()) for layer in layers[: int(share * len(layers))]])

    def losses(self, batch: Batch) -> Tensor:
        """Return the losses [B], with gradients; a soft label weighs both choices."""
        reward_0, reward_1 = self.scores(batch)
        return pair_losses(reward_0, reward_1, batch.label_0.to(reward_0.device, torch.float32))

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the raw rewards [B] of both sides."""
        with self.autocast():
            features = self.scorer.image_features(torch.cat([batch.image_0, batch.image_1]))
            rewards = self.scorer.raw_rewards(features, [*batch.prompts, *batch.prompts])
        return rewards.float().chunk(2)


class PalFamily(Family):
    """Train PAL's heads on the embeddings of a frozen CLIP; a pair counts for its user, or for the average one."""

    def unfreeze(self) -> None:
        """Train the heads alone."""
        self.scorer.module.requires_grad_(False)
        self.scorer.heads.requires_grad_(True)

    def losses(self, batch: Batch) -> Tensor:
        """Return the losses [B], with gradients to the heads."""
        reward_0, reward_1 = self.scores(batch)
        return pair_losses(reward_0, reward_1, batch.label_0.to(reward_0.device, torch.float32))

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rewards [B] of both sides for the user of each pair."""
        heads = self.scorer.heads
        with torch.no_grad(), self.autocast():
            images, text = self.image_embeddings(batch), self.scorer.text_embeddings(batch.prompts)
        ideals = heads.ideal_points(heads.weights(batch.users), text)
        return tuple(heads.rewards(heads.item(image), ideals) for image in images.chunk(2))


def family_of(
    scorer: Scorer | LatentScorer, recipe: RewardRecipe, pictures: Pictures | None, validated_at: Sequence[int] = ()
) -> Family:
    """Return how a scorer is trained.

    Raises:
        ScorerError: for a scorer that nothing here trains, and a step-aware one without `pictures`.
    """
    if isinstance(scorer, StepAware | LatentScorer) and pictures is None:
        raise ScorerError(
            "A step-aware model learns from one-step predictions, LPO's from noisy latents: give `pictures`, which "
            "makes them."
        )
    if isinstance(scorer, LatentScorer):
        return LatentFamily(scorer, recipe, pictures)
    if isinstance(scorer, StepAware):
        return StepAwareFamily(scorer, recipe, pictures, validated_at)
    if isinstance(scorer, ImageReward):
        return ImageRewardFamily(scorer, recipe)
    if isinstance(scorer, Pal):
        return PalFamily(scorer, recipe)
    if not isinstance(scorer, TwoTowerScorer) or not hasattr(scorer.module, "logit_scale"):
        raise ScorerError(f'"{scorer.name}" cannot be trained here: choose pickscore, hpsv2, image_reward or pal.')
    return Family(scorer, recipe)


def pair_weights(pairs: Sequence[RewardPair], counts: Counter, loss: str) -> Tensor:
    """Return the weights [B] of a GLOBAL batch: PickScore's are inverse to how many pairs share a prompt, sum 1."""
    if loss == "hps":
        return torch.ones(len(pairs))
    if loss == "pairwise":
        return torch.full((len(pairs),), 1 / len(pairs))
    return example_weights(torch.tensor([float(counts[pair.prompt]) for pair in pairs]))


def _freeze(groups: Sequence[list[nn.Parameter]]) -> None:
    for parameter in (parameter for group in groups for parameter in group):
        parameter.requires_grad_(False)
