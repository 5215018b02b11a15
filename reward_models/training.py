"""Fine-tune scorers on preference pairs, with the losses and recipes of their authors (`training_recipes.py`).

Every process of a `torch.distributed` group works on its part of each batch; the sums are those of one process.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_models import training_ranks as ranks
from reward_models.base import Scorer
from reward_models.errors import ScorerError
from reward_models.pairs import RewardPair, checked, index_batches, split_by_prompt
from reward_models.preprocess import ImageLike
from reward_models.step_aware import EVALUATED_AT
from reward_models.training_families import Family, LatentScorer, Pictures, family_of, pair_weights
from reward_models.training_recipes import HPSV2, PICKSCORE, RECIPES, RewardRecipe
from reward_models.training_state import TrainingResult, TrainingStopped, agreement, load_state, save_state

__all__ = [
    "HPSV2",
    "PICKSCORE",
    "RECIPES",
    "RewardRecipe",
    "TrainingResult",
    "TrainingStopped",
    "train_reward",
    "validation_accuracy",
]
Pairs = Iterable[RewardPair | tuple[ImageLike, ImageLike, str, float]]
Log = Callable[[dict[str, float]], None]


@dataclass
class _Run:
    family: Family
    train: list[RewardPair]
    held_out: list[RewardPair]
    recipe: RewardRecipe
    directory: Path | None
    log: Log | None
    stopping: Callable[[], object]
    say: Callable[[str], object]


def train_reward(
    scorer: Scorer | LatentScorer,
    pairs: Pairs,
    recipe: RewardRecipe,
    *,
    validation: Pairs | None = None,
    directory: str | Path | None = None,
    log: Log | None = None,
    pictures: Pictures | None = None,
    resume: bool = False,
    stopping: Callable[[], object] = lambda: False,
    say: Callable[[str], object] = print,
) -> TrainingResult:
    """Train `scorer` in place and leave it with the weights that did best in validation.

    Args:
        scorer: loaded with dtype=torch.float32; or a judge of noisy latents, whose network is not part of this package.
        pairs: (image_0, image_1, prompt, label_0) and maybe the user; images in any form, decoded when needed.
        recipe: one of `RECIPES` or a variant by `dataclasses.replace`.
        validation: held-out pairs; without it `recipe.validation_fraction` of the prompts is held out.
        directory: where every new best is saved in the scorer's official format, with the state to go on from.
        log: called with the record of each step.
        pictures: what a step-aware model or a judge of latents sees of a batch of pairs.
        resume: go on from the state in `directory`; on a CPU the result has the bits of an uninterrupted run.
        stopping: asked once a step; when any process says yes, all save the step and raise TrainingStopped.
        say: told in words of states that are damaged.

    Raises:
        TrainingStopped: as `stopping` wished.
        ScorerError: for unusable pairs, half-precision weights, or a loss that is not finite.
    """
    if any(parameter.dtype != torch.float32 for parameter in scorer.module.parameters()):
        raise ScorerError("Training needs float32 weights: load the scorer with dtype=torch.float32 (and set bf16).")
    if recipe.in_batch_negatives and ranks.count() > 1:
        raise ScorerError("in_batch_negatives compares all prompts of a batch: train with one process.")
    train, held_out = split(pairs, validation, recipe)
    if min(recipe.batch_size, len(train)) < ranks.count():
        raise ScorerError(f"A batch needs a pair for each of the {ranks.count()} processes. Use a larger batch_size.")
    family = family_of(scorer, recipe, pictures, EVALUATED_AT)
    try:
        place = None if directory is None else Path(directory)
        return _run(_Run(family, train, held_out, recipe, place, log, stopping, say), resume)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ScorerError(
            f"A process that decodes pictures died ({str(error).splitlines()[0].strip()}), perhaps because memory ran "
            "out. Resume the run with fewer workers (0 starts none)."
        ) from error
    finally:
        scorer.module.eval().requires_grad_(False)
        _forget_prompts(scorer)


def _run(run: _Run, resume: bool) -> TrainingResult:
    recipe, family, module = run.recipe, run.family, run.family.scorer.module
    done, best, result = 0, {}, TrainingResult()
    optimizer = _optimizer(family)
    agreed = agreement(recipe, run.train, run.held_out)
    if resume:
        if run.directory is None:
            raise ScorerError("resume needs the directory of the run.")
        done, best, result = load_state(run.directory, module, optimizer, agreed, run.say)
    counts = Counter(pair.prompt for pair in run.train)
    order = _order(len(run.train), recipe)[done:]
    batches = family.batches(run.train, [(visit, list(ranks.own(positions))) for visit, positions in order])
    for step, ((_, positions), batch) in enumerate(zip(order, batches, strict=True), start=done):
        rate = learning_rate(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        weights = ranks.own(pair_weights([run.train[i] for i in positions], counts, recipe.loss))
        loss, stopped = _train_step(run, batch, weights, optimizer, step)
        record = {"step": step + 1, "learning_rate": rate, "loss": loss}
        result.history.append(record)
        validated = (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.max_steps
        if validated:
            best = _validate(run, record, result) or best
        if run.directory is not None and ranks.rank() == 0 and (validated or stopped):
            save_state(run.directory, step + 1, module, optimizer, best, result, agreed)
        if run.log is not None:
            run.log(record)
        if stopped:
            raise TrainingStopped(step + 1)
    module.load_state_dict(best)
    return result


def _validate(run: _Run, record: dict[str, float], result: TrainingResult) -> dict[str, Tensor] | None:
    """Put the accuracies into `record`; return a copy of the weights and save them if they are the best so far."""
    scorer = run.family.scorer
    found = accuracies(run.family, run.held_out) if run.held_out else {}
    accuracy = sum(found.values()) / len(found) if found else None
    if accuracy is not None:
        record["validation_accuracy"] = accuracy
        record.update({f"validation_accuracy_{key}": value for key, value in found.items() if key is not None})
    if accuracy is not None and result.best_accuracy is not None and accuracy <= result.best_accuracy:
        return None
    result.best_step, result.best_accuracy = int(record["step"]), accuracy
    result.accuracy_at = {key: value for key, value in found.items() if key is not None}
    if run.directory is not None and ranks.rank() == 0:
        scorer.save(run.directory)
    ranks.wait()
    return {key: value.detach().to("cpu", copy=True) for key, value in scorer.module.state_dict().items()}


def learning_rate(recipe: RewardRecipe, step: int) -> float:
    """Return the rate of `step` (from 0): linear warm-up, then linear or cosine decay to 0 at max_steps."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.max_steps - recipe.warmup_steps)
    remaining = 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * remaining


def validation_accuracy(scorer: Scorer | LatentScorer, pairs: Pairs, *, pictures: Pictures | None = None) -> float:
    """Return mean(label_0 where score_0 > score_1, 1 - label_0 where it is lower): PickScore's metric for selection.

    Of a step-aware scorer it is the mean over `EVALUATED_AT`, of a judge of latents over its `validated_at`.
    """
    found = accuracies(family_of(scorer, PICKSCORE, pictures, EVALUATED_AT), checked(pairs))
    return sum(found.values()) / len(found)


@torch.no_grad()
def accuracies(family: Family, pairs: Sequence[RewardPair]) -> dict[int | None, float]:
    """Return the accuracy by timestep, under None for scorers that know none; processes share the pairs."""
    scorer = family.scorer
    scorer.module.eval()
    _forget_prompts(scorer)  # the weights may have changed since they were embedded
    correct: dict[int | None, float] = dict.fromkeys(getattr(family, "validated_at", [None]), 0.0)
    for timestep, batch in family.validation(ranks.own(pairs), scorer.batch_size):
        score_0, score_1 = (score.float().cpu() for score in family.scores(batch))
        label_0 = batch.label_0
        correct[timestep] += float((label_0 * (score_0 > score_1) + (1 - label_0) * (score_0 < score_1)).sum())
    summed = ranks.total(list(correct.values()), scorer.device)
    return {timestep: value / len(pairs) for timestep, value in zip(correct, summed, strict=True)}


def split(pairs: Pairs, validation: Pairs | None, recipe: RewardRecipe) -> tuple[list[RewardPair], list[RewardPair]]:
    """Return training and validation pairs, no prompt on both sides; raise ScorerError when there are none."""
    usable = checked(pairs)
    if recipe.drop_ties:
        usable = [pair for pair in usable if pair.label_0 != 0.5]
    if not usable:
        raise ScorerError("There are no training pairs. Give (image_0, image_1, prompt, label_0) items.")
    if validation is not None:
        return usable, checked(validation)
    if recipe.validation_fraction == 0:
        return usable, []
    return split_by_prompt(usable, recipe.validation_fraction, recipe.seed)


def _order(count: int, recipe: RewardRecipe) -> list[tuple[int, list[int]]]:
    """Return (visit, positions) of every batch; a visit is an epoch."""
    size = min(recipe.batch_size, count)
    batches = index_batches(count, recipe.batch_size, recipe.max_steps, recipe.seed)
    return [(step * size // count, positions) for step, positions in enumerate(batches)]


def _optimizer(family: Family) -> torch.optim.AdamW:
    recipe = family.recipe
    family.unfreeze()
    trainable = [parameter for parameter in family.scorer.module.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2 and not recipe.decay_vectors]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2 or recipe.decay_vectors]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps
    )


def _train_step(
    run: _Run, batch: tuple, weights: Tensor, optimizer: torch.optim.Optimizer, step: int
) -> tuple[float, bool]:
    """Move once along the gradient of the global batch; return its loss, and whether a process is to stop."""
    family = run.family
    scorer, recipe = family.scorer, family.recipe
    scorer.module.train()
    total, size = 0.0, recipe.micro_batch_size or len(weights)
    with torch.random.fork_rng(devices=[scorer.device] if scorer.device.type == "cuda" else []):
        torch.manual_seed(recipe.seed * 1_000_003 + step * ranks.count() + ranks.rank())  # of dropout
        for start in range(0, len(weights), size):
            losses = family.losses(batch.part(start, size))
            loss = (weights[start : start + size].to(losses.device) * losses).sum()
            loss.backward()
            total += loss.item()
    total, stopped = ranks.total([total, float(bool(run.stopping()))], scorer.device)
    if not math.isfinite(total):
        raise ScorerError(f"The loss became {total}. Lower learning_rate, or look for damaged images.")
    ranks.sum_gradients(scorer.module.parameters())
    if recipe.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(scorer.module.parameters(), recipe.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if recipe.max_logit_scale is not None and hasattr(scorer.module, "logit_scale"):
        with torch.no_grad():
            scorer.module.logit_scale.clamp_(0.0, math.log(recipe.max_logit_scale))
    return total, stopped > 0


def _forget_prompts(scorer: Scorer) -> None:
    """Drop embeddings of prompts that the weights of another step have made."""
    forget = getattr(scorer, "clear_cache", None)
    if forget is not None:
        forget()
