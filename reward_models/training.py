"""Fine-tune the two-tower scorers on preference pairs, with the losses and recipes of PickScore and HPSv2."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from reward_models.errors import ScorerError
from reward_models.losses import example_weights, hps_losses, pickscore_losses
from reward_models.pairs import PairPixels, RewardPair, checked, index_batches, split_by_prompt
from reward_models.preprocess import ImageLike
from reward_models.two_tower import TwoTowerScorer

Pairs = Iterable[RewardPair | tuple[ImageLike, ImageLike, str, float]]


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """Say how a scorer is trained; the defaults are PickScore's own (trainer/conf, commit f79607ff)."""

    loss: str = "pickscore"  # "pickscore": weighted mean; "hps": sum over the batch
    in_batch_negatives: bool = False  # PickScore's option: also tell the prompts of a batch apart
    learning_rate: float = 3.0e-6
    weight_decay: float = 0.3
    decay_vectors: bool = True  # decay biases, norms and logit_scale as well
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    batch_size: int = 128  # pairs
    micro_batch_size: int | None = None  # pairs a forward pass; the gradient is that of the whole batch
    max_steps: int = 4000
    warmup_steps: int = 500
    schedule: str = "linear"  # to 0 at max_steps; or "cosine"
    max_grad_norm: float | None = 1.0
    max_logit_scale: float | None = None  # upper bound of exp(logit_scale); None leaves it free
    unlocked_image_groups: int | None = None  # train the last groups of the image tower only; None: all
    unlocked_text_layers: int | None = None  # train the last blocks of the text tower only; None: all
    bf16: bool = False  # autocast of the towers; the official runs used bf16 (PickScore) and fp16 (HPSv2)
    eval_every: int = 100
    validation_fraction: float = 0.1  # of the prompts, when no validation pairs are given
    num_workers: int = 0  # processes that decode images
    seed: int = 42

    def __post_init__(self):
        """Raise ScorerError for values outside their range."""
        if self.loss not in ("pickscore", "hps") or self.schedule not in ("linear", "cosine"):
            raise ScorerError(
                f'loss is "pickscore" or "hps", schedule "linear" or "cosine"; got "{self.loss}", "{self.schedule}".'
            )
        for name in ("batch_size", "max_steps", "eval_every", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ScorerError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ScorerError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}.")
        if self.in_batch_negatives and (self.loss != "pickscore" or self.micro_batch_size):
            raise ScorerError('in_batch_negatives needs loss "pickscore" and the whole batch: no micro_batch_size.')


PICKSCORE = RewardRecipe()
HPSV2 = RewardRecipe(
    loss="hps",
    learning_rate=3.3e-6,
    weight_decay=0.35,
    decay_vectors=False,
    betas=(0.9, 0.98),
    eps=1.0e-6,
    schedule="cosine",
    max_grad_norm=None,
    max_logit_scale=100.0,
    unlocked_image_groups=20,
    unlocked_text_layers=11,
    seed=16,
)  # configs/HPSv2.sh, commit 866735ec; 4000 steps are the paper's


@dataclass
class TrainingResult:
    """Tell how a training run went."""

    best_step: int = 0
    best_accuracy: float | None = None  # on the validation pairs; None without any
    history: list[dict[str, float]] = field(default_factory=list)  # one record a step


def train_reward(
    scorer: TwoTowerScorer,
    pairs: Pairs,
    recipe: RewardRecipe,
    *,
    validation: Pairs | None = None,
    directory: str | Path | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train `scorer` in place and leave it with the weights that did best in validation.

    Args:
        scorer: loaded with dtype=torch.float32.
        pairs: (image_0, image_1, prompt, label_0); images in any form, decoded when a batch needs them.
        recipe: `PICKSCORE`, `HPSV2` or a variant by `dataclasses.replace`.
        validation: held-out pairs; without it `recipe.validation_fraction` of the prompts is held out.
        directory: where every new best is saved in the scorer's official format.
        log: called with the record of each step.

    Raises:
        ScorerError: for unusable pairs, half-precision weights, or a loss that is not finite.
    """
    if scorer.dtype != torch.float32:
        raise ScorerError("Training needs float32 weights: load the scorer with dtype=torch.float32 (and set bf16).")
    train, held_out = _split(checked(pairs), validation, recipe)
    try:
        return _run(scorer, train, held_out, recipe, directory, log)
    finally:
        scorer.module.eval().requires_grad_(False)
        scorer.clear_cache()


def _run(
    scorer: TwoTowerScorer,
    train: Sequence[RewardPair],
    held_out: Sequence[RewardPair],
    recipe: RewardRecipe,
    directory: str | Path | None,
    log: Callable[[dict[str, float]], None] | None,
) -> TrainingResult:
    result = TrainingResult()
    best: dict[str, Tensor] = {}
    optimizer = _optimizer(scorer, recipe)
    for step, batch in enumerate(_loader(train, scorer, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = _train_step(scorer, batch, recipe, optimizer)
        record = {"step": step + 1, "learning_rate": learning_rate(recipe, step), "loss": loss}
        if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.max_steps:
            accuracy = validation_accuracy(scorer, held_out) if held_out else None
            if accuracy is not None:
                record["validation_accuracy"] = accuracy
            if accuracy is None or result.best_accuracy is None or accuracy > result.best_accuracy:
                result.best_step, result.best_accuracy = step + 1, accuracy
                best = {key: value.detach().to("cpu", copy=True) for key, value in scorer.module.state_dict().items()}
                if directory is not None:
                    scorer.save(directory)
        result.history.append(record)
        if log is not None:
            log(record)
    scorer.module.load_state_dict(best)
    return result


def learning_rate(recipe: RewardRecipe, step: int) -> float:
    """Return the rate of `step` (from 0): linear warm-up, then linear or cosine decay to 0 at max_steps."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.max_steps - recipe.warmup_steps)
    remaining = 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * remaining


@torch.no_grad()
def validation_accuracy(scorer: TwoTowerScorer, pairs: Pairs) -> float:
    """Return mean(label_0 where score_0 > score_1, 1 - label_0 where it is lower): PickScore's metric for selection."""
    pairs = checked(pairs)
    scorer.module.eval()
    scorer.clear_cache()  # the weights may have changed since it was filled
    correct = 0.0
    for image_0, image_1, prompts, label_0, _ in DataLoader(
        PairPixels(pairs, scorer.preprocess), batch_size=scorer.batch_size, generator=torch.Generator()
    ):
        score_0, score_1 = scorer.score_pixels(torch.cat([image_0, image_1]), [*prompts, *prompts]).cpu().chunk(2)
        correct += float((label_0 * (score_0 > score_1) + (1 - label_0) * (score_0 < score_1)).sum())
    scorer.clear_cache()
    return correct / len(pairs)


def _split(
    pairs: list[RewardPair], validation: Pairs | None, recipe: RewardRecipe
) -> tuple[list[RewardPair], list[RewardPair]]:
    if not pairs:
        raise ScorerError("There are no training pairs. Give (image_0, image_1, prompt, label_0) items.")
    if validation is not None:
        return pairs, checked(validation)
    if recipe.validation_fraction == 0:
        return pairs, []
    return split_by_prompt(pairs, recipe.validation_fraction, recipe.seed)


def _loader(pairs: Sequence[RewardPair], scorer: TwoTowerScorer, recipe: RewardRecipe) -> DataLoader:
    batches = list(index_batches(len(pairs), recipe.batch_size, recipe.max_steps, recipe.seed))
    # its own generator keeps the loader from drawing from the global one
    return DataLoader(
        PairPixels(pairs, scorer.preprocess),
        batch_sampler=batches,
        num_workers=recipe.num_workers,
        generator=torch.Generator(),
    )


def _optimizer(scorer: TwoTowerScorer, recipe: RewardRecipe) -> torch.optim.AdamW:
    scorer.module.requires_grad_(True)
    if recipe.unlocked_image_groups is not None:
        _freeze(scorer.image_groups(), keep=recipe.unlocked_image_groups, always_first=False)
    if recipe.unlocked_text_layers is not None:
        _freeze(scorer.text_groups(), keep=recipe.unlocked_text_layers, always_first=True)
    trainable = [parameter for parameter in scorer.module.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2 and not recipe.decay_vectors]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2 or recipe.decay_vectors]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps
    )


def _freeze(groups: list[list[nn.Parameter]], *, keep: int, always_first: bool) -> None:
    """Freeze all but the last `keep` groups; `always_first` freezes the first (embeddings) in any case."""
    frozen = groups[: max(0, len(groups) - keep)] or (groups[:1] if always_first else [])
    for parameter in (parameter for group in frozen for parameter in group):
        parameter.requires_grad_(False)


def _train_step(
    scorer: TwoTowerScorer, batch: Sequence, recipe: RewardRecipe, optimizer: torch.optim.Optimizer
) -> float:
    image_0, image_1, prompts, label_0, pairs_of_prompt = batch
    weights = example_weights(pairs_of_prompt) if recipe.loss == "pickscore" else torch.ones_like(pairs_of_prompt)
    scorer.module.train()
    total = 0.0
    size = recipe.micro_batch_size or len(prompts)
    for part in (slice(start, start + size) for start in range(0, len(prompts), size)):
        images = torch.cat([image_0[part], image_1[part]])
        with torch.autocast(scorer.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
            embeddings_0, embeddings_1 = scorer.image_embeddings(images).chunk(2)
            text = scorer.text_embeddings(prompts[part])
        losses = _losses(recipe, (embeddings_0, embeddings_1, text), scorer.logit_scale, label_0[part])
        loss = (weights[part].to(losses.device) * losses).sum()
        if not torch.isfinite(loss):
            raise ScorerError(f"The loss became {loss.item()}. Lower learning_rate, or look for damaged images.")
        loss.backward()
        total += loss.item()
    if recipe.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(scorer.module.parameters(), recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if recipe.max_logit_scale is not None:
        with torch.no_grad():
            scorer.module.logit_scale.clamp_(0.0, math.log(recipe.max_logit_scale))
    return total


def _losses(recipe: RewardRecipe, embeddings: tuple[Tensor, Tensor, Tensor], scale: Tensor, label_0: Tensor) -> Tensor:
    label_0 = label_0.to(scale.device, torch.float32)
    if recipe.loss == "hps":
        return hps_losses(*embeddings, scale, label_0)
    return pickscore_losses(*embeddings, scale, label_0, in_batch_negatives=recipe.in_batch_negatives)
