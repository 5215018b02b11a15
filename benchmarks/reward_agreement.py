"""How often the embedded reward models agree with the oracle on pictures of held-out prompts.

`python -m benchmarks reward-agreement` draws four pictures of each of the 400 held-out prompts with the base model. Two
kinds of pairs: the best and the worst of four by the oracle, as in assets/tiny-pairs, and the first two, whatever they
are. Pairs that the oracle separates by less than 0.03 are ties and left out. The step-aware model is also asked about
what one guided step predicts from the pictures at several noise levels, and LPO's judge about their noisy latents.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import reward_models
from benchmarks.method_runs import PROMPTS, ROOT
from diffalign.backbones import loading
from diffalign.evaluation import generate_to, prompt_plan
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.rewards.reward_latents import NoisyLatents
from diffalign.jobs.rewards.reward_pictures import OneStepPictures
from diffalign.jobs.world.world_data import SAMPLING, World
from diffalign.rollout import LatentReward
from diffalign.shapes.oracle import Oracle
from reward_models.pairs import RewardPair
from reward_models.step_aware import EVALUATED_AT, StepAware

PIPELINE = ROOT / "assets" / "tiny-sdxl"
MODELS = {"pickscore": "tiny-pickscore", "hpsv2": "tiny-hpsv2", "step_aware": "tiny-step-aware"}
DRAWN, SEED = 4, 77_000_000
GAPS = (World().tie_gap, 0.1, 0.2)
BATCH = 50

Ahead = Callable[[list[RewardPair], int], Tensor]  # (pairs, timestep) -> whether the first picture is ahead, [B] bool


def run(output: Path) -> dict[str, Any]:
    """Draw (or find) the pictures in `output`, score them, and return the shares of agreement."""
    ids, texts, seeds = prompt_plan(read_prompts(PROMPTS), DRAWN, SEED)
    pipeline = loading.load(PIPELINE).pipeline()
    drawn = generate_to(output / "images", pipeline, texts, seeds, SAMPLING, identity="base", prompt_ids=ids)
    pictures = [Image.open(path).convert("RGB") for path in drawn.paths]
    truth = Oracle().score(pictures, texts)
    kinds = {"best and worst of four": best_and_worst(truth), "first two": first_two(truth)}
    clear = clear_pairs(pictures, texts, truth, kinds["best and worst of four"])
    found: dict[str, Any] = {"prompts": len(texts) // DRAWN, "pairs": {}}
    for kind, pairs in kinds.items():
        gaps = (truth[pairs[:, 0]] - truth[pairs[:, 1]]).abs()
        found["pairs"][kind] = {"mean_gap": gaps.mean().item(), "count": {f"{g}": int((gaps >= g).sum()) for g in GAPS}}
    for name, folder in MODELS.items():
        scorer = reward_models.load(name, ROOT / "assets" / folder, dtype=torch.float32)
        scores = scorer.score(pictures, texts)
        found[folder] = {kind: agreement(scores, truth, pairs) for kind, pairs in kinds.items()}
        if name == "step_aware":
            found[folder]["noised"] = agreement_at(EVALUATED_AT, clear, ahead_in_predictions(scorer))
    judge, latents = ahead_in_latents(ROOT / "assets" / "tiny-lrm", output / "latents")
    found["tiny-lrm"] = {"noised": agreement_at(judge.validated_at, clear, latents)}
    return found


def best_and_worst(truth: Tensor) -> Tensor:
    """Return the rows [P, 2] of best and worst of the four pictures of each prompt."""
    groups, starts = truth.view(-1, DRAWN), torch.arange(0, len(truth), DRAWN)
    return torch.stack([starts + groups.argmax(1), starts + groups.argmin(1)], dim=1)


def first_two(truth: Tensor) -> Tensor:
    """Return the rows [P, 2] of the first two pictures of each prompt."""
    starts = torch.arange(0, len(truth), DRAWN)
    return torch.stack([starts, starts + 1], dim=1)


def agreement(scores: Tensor, truth: Tensor, pairs: Tensor) -> dict[str, dict[str, float]]:
    """Return the share of pairs whose order two scores agree on, with its standard error, by least gap of the truth."""
    first, second = pairs.unbind(1)
    gaps, agreed = truth[first] - truth[second], (scores[first] - scores[second]) * (truth[first] - truth[second]) > 0
    return {f"{gap}": share(agreed[gaps.abs() >= gap]) for gap in GAPS}


def share(agreed: Tensor) -> dict[str, float]:
    """Return the mean of booleans [N] and its standard error."""
    mean = agreed.float().mean().item()
    return {"share": mean, "error": math.sqrt(mean * (1 - mean) / len(agreed))}


def clear_pairs(pictures: list[Image.Image], texts: list[str], truth: Tensor, pairs: Tensor) -> list[RewardPair]:
    """Return the pairs that are no ties."""
    clear = pairs[(truth[pairs[:, 0]] - truth[pairs[:, 1]]).abs() >= GAPS[0]]
    return [RewardPair(pictures[a], pictures[b], texts[a], float(truth[a] > truth[b])) for a, b in clear.tolist()]


def agreement_at(timesteps: Sequence[int], pairs: list[RewardPair], ahead: Ahead) -> dict[str, dict[str, float]]:
    """Return by timestep how often the first picture is ahead where it is the better one."""
    found = {}
    for timestep in timesteps:
        agreed = []
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            agreed.append(ahead(part, timestep) == torch.tensor([pair.label_0 == 1 for pair in part]))
        found[f"{timestep}"] = share(torch.cat(agreed))
    return found


def ahead_in_predictions(scorer: StepAware) -> Ahead:
    """Return what compares, by a step-aware model, the pictures that one guided step predicts."""
    predicted = OneStepPictures(loading.load(PIPELINE))

    def ahead(pairs: list[RewardPair], timestep: int) -> Tensor:
        first, second, timesteps = predicted(pairs, 0, timestep)
        prompts = [pair.prompt for pair in pairs]
        return scorer.score(first, prompts, timesteps) > scorer.score(second, prompts, timesteps)

    return ahead


def ahead_in_latents(folder: Path, scratch: Path) -> tuple[LatentReward, Ahead]:
    """Return LPO's judge in `folder` and what compares noisy latents by it; clean ones are kept in `scratch`."""
    base = loading.load(PIPELINE)
    side = base.denoiser.config.sample_size * base.vae_scale_factor
    judge = LatentReward.load(folder, base, torch.device("cpu"), side)
    noisy = NoisyLatents(base, scratch, side, seed=0)

    def ahead(pairs: list[RewardPair], timestep: int) -> Tensor:
        first, second, timesteps = noisy(pairs, 0, timestep)
        prompts = [pair.prompt for pair in pairs]
        return judge(first, prompts, timesteps)[0] > judge(second, prompts, timesteps)[0]

    return judge, ahead
