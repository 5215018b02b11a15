"""Pairs of single steps: SPO, and with other hooks LPO and TailorPO.

From a latent, k candidates for the next one are drawn and judged. Best and worst become a pair if they differ enough,
and the sampler goes on from a random one, whatever its score.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffalign import denoising
from diffalign.denoising import Rollout, TransitionBatch
from diffalign.errors import ConfigError
from diffalign.rollout.guidance import WinnerGuidance
from diffalign.rollout.prompts import PromptBatch
from diffalign.rollout.sampler import Sampler
from diffalign.rollout.scoring import StepScorer
from diffalign.rollout.selection import Selection, best_and_worst, dynamic_threshold


@dataclass(kw_only=True)
class StepPairs:
    """Collect pairs of steps.

    Args:
        num_candidates: k >= 2. SPO: 4, for SDXL 2.
        divert_start_step: steps before the first candidates, a single sample each. SPO: 4 of 20; LPO: 0.
        num_inner_steps: single steps each candidate goes on before it is judged; all of them share its label. SPO: 0,
            for SDXL 3.
        threshold: smallest gap of the preference probabilities that is learnt from. SPO: 0.3, for SDXL 0.4.
        threshold_high: LPO's threshold rises with the std of the step, from `threshold` to this; None: constant.
        resample: what the sampler goes on from. "random" in SPO; "best" is an ablation of the paper (worse).
        keep_predictions: record what the sampling network predicted (GradSPO), without inner steps only.
        timesteps_of: which level a scorer of noisy latents is told: the "candidate"'s own, or the "current" one (LPO).
        guidance: moves the winners once all candidates are judged (TailorPO-G), without inner steps only; the sampler
            goes on from candidates as they were drawn.
    """

    sampler: Sampler
    scorer: StepScorer
    num_candidates: int = 4
    divert_start_step: int = 4
    num_inner_steps: int = 0
    threshold: float = 0.3
    threshold_high: float | None = None
    resample: Literal["random", "best"] = "random"
    timesteps_of: Literal["candidate", "current"] = "candidate"
    keep_predictions: bool = False
    guidance: WinnerGuidance | None = None

    def __post_init__(self) -> None:
        steps = self.sampler.num_inference_steps
        if self.num_candidates < 2 or not 0 <= self.divert_start_step < steps:
            raise ConfigError(
                f"Pairs of steps need at least 2 candidates and a first one before step {steps}; got num_candidates "
                f"{self.num_candidates} and divert_start_step {self.divert_start_step}."
            )
        if (self.keep_predictions or self.guidance) and self.num_inner_steps:
            raise ConfigError(
                "Pairs of GradSPO and TailorPO-G have no inner steps: num_inner_steps must be 0, got "
                f"{self.num_inner_steps}."
            )
        self._check_levels_told()
        self._thresholds = self._threshold_by_step()

    @property
    def examples_per_prompt(self) -> int:
        """Return how many pairs a prompt gives, unclear ones included."""
        return self.sampler.num_inference_steps - self.divert_start_step

    def __call__(self, prompts: PromptBatch, step: int) -> Rollout:
        """Sample once for every prompt and return all pairs, with those too close to call marked."""
        sampler, steps = self.sampler, self.sampler.num_inference_steps
        x, pred = sampler.start(prompts, step), None
        found: list[TransitionBatch] = []
        scores = torch.empty(0)
        index = 0
        while index < steps:
            if pred is None:
                pred = sampler.predict(x, index, prompts.cond, prompts.empty)
            if index < self.divert_start_step:
                x, pred = sampler.move(x, pred, index, sampler.noise(prompts, step, f"step{index}")), None
                index += 1
                continue
            visited = self._branch(prompts, step, x, pred, index)
            last = index + len(visited) - 1
            scores, predictions = self._judge(prompts, visited[-1], last)
            selection = best_and_worst(scores, self._thresholds[index].item(), self.scorer.scale)
            pairs = self._pairs(visited, index, selection, pred if self.keep_predictions else None)
            found += pairs if self.guidance is None else [self._guided(*pairs, prompts, last)]
            chosen = self._resampled(prompts, step, index, scores)
            x = _picked(visited[-1], chosen)
            pred = None if predictions is None else _picked(predictions, chosen)
            index = last
        reward = scores.mean(0)
        return Rollout(
            transitions=TransitionBatch.cat(found),
            prompt_ids=prompts.ids,
            cond=prompts.cond,
            empty=prompts.empty,
            reward=reward,
        )

    def _branch(self, prompts: PromptBatch, step: int, x: Tensor, pred: Tensor, index: int) -> list[Tensor]:
        """Return the latents [k,B,...] of all branches: where they start, the candidates, and the inner steps."""
        sampler, k = self.sampler, self.num_candidates
        copies = (k, *(1 for _ in x.shape[1:]))
        start = x.repeat(copies)
        latents = sampler.move(start, pred.repeat(copies), index, sampler.noise(prompts, step, f"step{index}", k))
        visited = [start, latents]
        _, cond = prompts.copies(k)
        for inner in range(index + 1, min(index + 1 + self.num_inner_steps, sampler.num_inference_steps)):
            inner_pred = sampler.predict(latents, inner, cond, prompts.empty)
            latents = sampler.move(latents, inner_pred, inner, sampler.noise(prompts, step, f"step{inner}", k))
            visited.append(latents)
        return [part.unflatten(0, (k, len(prompts))) for part in visited]

    def _judge(self, prompts: PromptBatch, ends: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """Return the scores [k,B] of branches that end at level `index`, and predictions [k,B,...] if they were needed.

        A branch that has ended is judged as a finished picture, at timestep 0.
        """
        sampler, k = self.sampler, self.num_candidates
        texts, cond = prompts.copies(k)
        latents, pred = ends.flatten(0, 1), None
        finished = index == sampler.num_inference_steps
        if finished and self.scorer.reads_prediction:
            timesteps = torch.zeros(len(latents), dtype=sampler.ladder.timesteps.dtype, device=latents.device)
        elif self.scorer.reads_prediction:
            pred = sampler.predict(latents, index, cond, prompts.empty)
            timesteps = sampler.at(sampler.ladder.timesteps, index, latents)
            latents = denoising.to_x0(sampler.path, latents, pred, timesteps)
        else:
            levels = sampler.ladder.timesteps if self.timesteps_of == "current" else sampler.ladder.previous
            timesteps = sampler.at(levels, index - 1, latents)
        scores = self.scorer(latents, texts, timesteps)[0].unflatten(0, (k, len(prompts)))
        return scores, None if pred is None else pred.unflatten(0, (k, len(prompts)))

    def _pairs(
        self, visited: list[Tensor], index: int, selection: Selection, pred: Tensor | None
    ) -> list[TransitionBatch]:
        """Return the transitions of winner and loser; those of one step share the latent they start from."""
        count, device = visited[0].shape[1], visited[0].device
        ladder, pairs = self.sampler.ladder, []
        for offset, (here, there) in enumerate(pairwise(visited)):
            ends = [torch.stack([_picked(x, w) for w in (selection.winner, selection.loser)], 1) for x in (here, there)]
            pairs.append(
                TransitionBatch(
                    xt=ends[0] if self.num_inner_steps else ends[0][:, :1],
                    x_prev=ends[1],
                    timesteps=ladder.timesteps[index + offset].to(device).repeat(count),
                    previous=ladder.previous[index + offset].to(device).repeat(count),
                    prompt=torch.arange(count, device=device),
                    kept=selection.kept,
                    behavior_pred=pred,
                )
            )
        return pairs

    def _guided(self, pairs: TransitionBatch, prompts: PromptBatch, index: int) -> TransitionBatch:
        """Return pairs whose candidates are at level `index` with the winners moved."""
        assert self.guidance is not None
        winners, losers = pairs.x_prev.unbind(1)
        return replace(pairs, x_prev=torch.stack([self.guidance(winners, prompts, index), losers], 1))

    def _resampled(self, prompts: PromptBatch, step: int, index: int, scores: Tensor) -> Tensor:
        """Return which candidate [B] the sampler goes on from."""
        if self.resample == "best":
            return scores.argmax(0)
        fraction = denoising.uniform(self.sampler.seed, step, prompts.ids, stream=f"rollout_resample{index}")
        return (fraction * self.num_candidates).to(torch.int64)

    def _check_levels_told(self) -> None:
        """Refuse to tell a judge of noisy latents that candidates are pure noise, a level at which none is trained."""
        first, noise = self.divert_start_step == 0, denoising.ends_in_noise(self.sampler.path)
        if self.timesteps_of == "current" and not self.scorer.reads_prediction and first and noise:
            raise ConfigError(
                "This model's schedule ends in pure noise, where the first step starts: with rollout.timesteps_of "
                '"current" the judge would be told that its candidates are that. Use "candidate", or divert_start_step '
                "1."
            )

    def _threshold_by_step(self) -> Tensor:
        """Return the threshold of every step [S]."""
        sampler = self.sampler
        if self.threshold_high is None:
            return torch.full((sampler.num_inference_steps,), self.threshold)
        x = torch.zeros(sampler.num_inference_steps, 1)
        std = denoising.ddim_step(sampler.path, x, x, sampler.ladder.timesteps, sampler.ladder.previous).std
        return dynamic_threshold(std, self.threshold, self.threshold_high)


def _picked(candidates: Tensor, chosen: Tensor) -> Tensor:
    """Return one candidate [B,...] of [k,B,...] for each prompt."""
    return candidates[chosen, torch.arange(candidates.shape[1], device=candidates.device)]
