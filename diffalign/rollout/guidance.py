"""Gradient guidance of preferred candidates: TailorPO-G (Ren et al. 2025, arXiv 2502.01667).

    x_w <- x_w + scale * grad_x R( x0_hat(x_w) ),   scale = zeta, or zeta * std^2 of the step that led to x_w

Learning from the moved candidate widens the gap of a pair. The authors published no code; zeta and how it changes over
the steps are ours, not theirs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign import denoising
from diffalign.errors import ConfigError
from diffalign.rollout.prompts import PromptBatch
from diffalign.rollout.sampler import Sampler
from diffalign.rollout.scoring import PictureScorer, StepScorer


@dataclass(kw_only=True)
class WinnerGuidance:
    """Move latents along the gradient of the reward of the picture that one step predicts from them.

    Args:
        zeta: > 0, in latents a unit of reward.
        schedule: "constant", or "variance": times the variance of the step that led to the latent, as classifier
            guidance has it. The last step's is small.

    Raises:
        ConfigError: the scorer reads no pictures, or has no gradient.
    """

    sampler: Sampler
    scorer: StepScorer
    zeta: float
    schedule: Literal["constant", "variance"] = "constant"

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, PictureScorer) or not self.scorer.is_differentiable:
            raise ConfigError(
                "rollout.winner_guidance follows the gradient of a reward model of pictures (one with score_tensor); "
                "rollout.scorer names none. Use e.g. pickscore, or winner_guidance 0."
            )

    def __call__(self, x: Tensor, prompts: PromptBatch, index: int) -> Tensor:
        """Return latents x [B,C,h,w] moved and as they are stored; they are at level `index` of the ladder.

        Finished ones are at its length.
        """
        moved = x + self._scale(x, index) * self.gradient(x, prompts, index)
        return moved.to(self.sampler.storage_dtype).float()

    def gradient(self, x: Tensor, prompts: PromptBatch, index: int) -> Tensor:
        """Return the gradient [B,C,h,w] of the reward of each latent's picture, as many at a time as are decoded."""
        parts = -(-len(x) // self.scorer.batch_size)
        rows = torch.arange(len(x), device=x.device).tensor_split(parts)
        return torch.cat([self._gradient(x[part], prompts.select(part), index) for part in rows])

    def _gradient(self, x: Tensor, prompts: PromptBatch, index: int) -> Tensor:
        sampler, x = self.sampler, x.detach().requires_grad_()
        with sampler.network.differentiable() as network:
            if index == sampler.num_inference_steps:
                timesteps, x0 = torch.zeros(len(x), dtype=sampler.ladder.timesteps.dtype, device=x.device), x
            else:
                timesteps = sampler.at(sampler.ladder.timesteps, index, x)
                sampler.evaluations.predicted += len(x)
                pred = denoising.guided(network, x, timesteps, prompts.cond, prompts.empty, sampler.guidance_scale)
                x0 = denoising.to_x0(sampler.path, x, pred, timesteps)
            rewards = self.scorer.differentiable(x0, prompts.texts, timesteps)
            return torch.autograd.grad(rewards.sum(), x)[0]

    def _scale(self, x: Tensor, index: int) -> float:
        if self.schedule == "constant":
            return self.zeta
        return self.zeta * self.sampler.distribution(x[:1], x[:1], index - 1).std.item() ** 2
