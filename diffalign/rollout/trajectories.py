"""Whole trajectories, judged by their finished pictures: D3PO's pairs of them, and DDPO's single ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from diffalign.denoising import Rollout, TransitionBatch
from diffalign.errors import ConfigError
from diffalign.rollout.prompts import PromptBatch
from diffalign.rollout.sampler import Sampler
from diffalign.rollout.scoring import StepScorer
from diffalign.rollout.selection import extremes, pareto

# (prompts [N], their ids [N], rewards [N] of this process) -> advantages [N]; compares with other processes and steps
# as it likes.
Advantages = Callable[[Sequence[str], Sequence[int], Tensor], Tensor]


@dataclass(kw_only=True)
class _Drawn:
    """Hold G trajectories for each of B prompts."""

    latents: Tensor  # [S+1,G,B,...], as they were stored
    log_probs: Tensor  # [S,G,B], of the steps under the network that took them
    rewards: Tensor  # [R,G,B]


def walk(
    sampler: Sampler, prompts: PromptBatch, step: int, copies: int, shared: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Sample `copies` trajectories for every prompt, from the same start if `shared`.

    Returns their latents [copies*B,...], from the start on, and the log-probabilities [copies*B] of their steps.
    """
    _, cond = prompts.copies(copies)
    x = sampler.start(prompts, step, 1 if shared else copies)
    x = x.repeat(copies, *(1 for _ in x.shape[1:])) if shared else x
    latents, log_probs = [x], []
    for index in range(sampler.num_inference_steps):
        distribution = sampler.distribution(x, sampler.predict(x, index, cond, prompts.empty), index)
        x = distribution.sample(sampler.noise(prompts, step, f"step{index}", copies), sampler.storage_dtype)
        latents.append(x)
        log_probs.append(distribution.log_prob(x))
    return latents, log_probs


def draw(sampler: Sampler, scorer: StepScorer, prompts: PromptBatch, step: int, copies: int, shared: bool) -> _Drawn:
    """Sample trajectories as `walk` does, and score the pictures."""
    texts, _ = prompts.copies(copies)
    latents, log_probs = walk(sampler, prompts, step, copies, shared)
    x = latents[-1]
    finished = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    grid = (copies, len(prompts))
    return _Drawn(
        latents=torch.stack(latents).unflatten(1, grid),
        log_probs=torch.stack(log_probs).unflatten(1, grid),
        rewards=scorer(x, texts, finished).unflatten(1, grid),
    )


@dataclass(kw_only=True)
class TrajectoryPairs:
    """Collect pairs of trajectories; the steps of them are examples (D3PO).

    The better one is better in some reward and worse in none; otherwise the pair is a tie, which has no gradient.

    Args:
        samples_per_prompt: G >= 2. The paper's code: 2, with human labels 7.
        pairs: "all" G (G - 1) / 2 of a prompt, or the "best_and_worst" of its trajectories (as Flow-GRPO's online DPO).
        shared_noise: trajectories of a prompt start from the same noise, as in the paper's code.
        learnt_steps: which steps become examples; None: all, as in the paper.
    """

    sampler: Sampler
    scorer: StepScorer
    samples_per_prompt: int = 2
    pairs: Literal["all", "best_and_worst"] = "all"
    shared_noise: bool = True
    learnt_steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 2:
            raise ConfigError(f"A pair needs samples_per_prompt >= 2, got {self.samples_per_prompt}.")

    @property
    def examples_per_prompt(self) -> int:
        """Return how many pairs of steps a prompt gives."""
        count = math.comb(self.samples_per_prompt, 2) if self.pairs == "all" else 1
        return count * len(_learnt(self))

    def __call__(self, prompts: PromptBatch, step: int) -> Rollout:
        """Sample for every prompt and return the pairs of all steps."""
        drawn = draw(self.sampler, self.scorer, prompts, step, self.samples_per_prompt, self.shared_noise)
        rewards, places = drawn.rewards, torch.arange(len(prompts), device=drawn.rewards.device)
        parts = []
        for a, b in self._chosen(rewards):
            label = pareto(rewards[:, a, places], rewards[:, b, places])
            for index in _learnt(self):
                # [2,B,...] of the two trajectories, at both ends of the step
                ends = [drawn.latents[level][torch.stack([a, b]), places] for level in (index, index + 1)]
                here, there = (end.transpose(0, 1) for end in ends)
                parts.append(_examples(self.sampler, index, here, there, label=label))
        return _rollout(prompts, drawn, parts)

    def _chosen(self, rewards: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return which trajectories [B] of the prompts make pairs, from their rewards [R,G,B]."""
        if self.pairs == "best_and_worst":
            return [extremes(rewards)]
        copies = torch.arange(self.samples_per_prompt, device=rewards.device)[:, None].expand(-1, rewards.shape[2])
        return list(combinations(copies, 2))


@dataclass(kw_only=True)
class Trajectories:
    """Collect single trajectories; their steps are examples with the advantage of the picture (DDPO).

    Args:
        samples_per_prompt: G >= 1.
        advantages: turns rewards into advantages.
        shared_noise: trajectories of a prompt start from the same noise; in the paper's code each has its own.
        learnt_steps: which steps become examples; None: all, as in the paper.
    """

    sampler: Sampler
    scorer: StepScorer
    advantages: Advantages
    samples_per_prompt: int = 1
    shared_noise: bool = False
    learnt_steps: Sequence[int] | None = None

    @property
    def examples_per_prompt(self) -> int:
        """Return how many steps a prompt gives."""
        return self.samples_per_prompt * len(_learnt(self))

    def __call__(self, prompts: PromptBatch, step: int) -> Rollout:
        """Sample for every prompt and return all steps."""
        drawn = draw(self.sampler, self.scorer, prompts, step, self.samples_per_prompt, self.shared_noise)
        texts, _ = prompts.copies(self.samples_per_prompt)
        rewards = drawn.rewards.mean(0)
        ids = prompts.ids.tolist() * self.samples_per_prompt
        worth = self.advantages(texts, ids, rewards.flatten().cpu()).to(rewards).view_as(rewards)
        parts = []
        for copy in range(self.samples_per_prompt):
            for index in _learnt(self):
                here, there = drawn.latents[index, copy][:, None], drawn.latents[index + 1, copy][:, None]
                behavior = drawn.log_probs[index, copy]
                parts.append(
                    _examples(self.sampler, index, here, there, advantages=worth[copy], behavior_log_prob=behavior)
                )
        return _rollout(prompts, drawn, parts)


def _learnt(collector: TrajectoryPairs | Trajectories) -> Sequence[int]:
    return collector.sampler.steps_within() if collector.learnt_steps is None else collector.learnt_steps


def _examples(sampler: Sampler, index: int, xt: Tensor, x_prev: Tensor, **columns: Tensor) -> TransitionBatch:
    """Return the examples of one step for B prompts: xt, x_prev [B,m,...]."""
    count, device = len(xt), xt.device
    label = columns.get("label")
    return TransitionBatch(
        xt=xt,
        x_prev=x_prev,
        timesteps=sampler.ladder.timesteps[index].to(device).repeat(count),
        previous=sampler.ladder.previous[index].to(device).repeat(count),
        prompt=torch.arange(count, device=device),
        kept=torch.ones(count, dtype=torch.bool, device=device) if label is None else label != 0,
        **columns,
    )


def _rollout(prompts: PromptBatch, drawn: _Drawn, parts: list[TransitionBatch]) -> Rollout:
    return Rollout(
        transitions=TransitionBatch.cat(parts),
        prompt_ids=prompts.ids,
        cond=prompts.cond,
        empty=prompts.empty,
        reward=drawn.rewards[0].mean(0),
    )
