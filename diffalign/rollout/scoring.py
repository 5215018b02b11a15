"""Scores of latents: of finished pictures, and of what one step predicts from an unfinished one."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.backbones.base import Backbone
from diffalign.errors import DataError
from diffalign.rollout.sampler import Evaluations


class StepScorer(Protocol):
    """Judge latents on their way."""

    reads_prediction: bool  # True: `latents` are clean ones, predicted in one step; False: the noisy ones themselves
    scale: float  # turns a difference of scores into a logit

    def __call__(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return scores [R,N] of latents [N,C,h,w] at timesteps [N] (0: finished), one row a reward."""


class PictureScorer:
    """Decode latents and let reward models score the pictures, without gradient.

    A reward model that takes `timesteps` (SPO's step-aware one) is told how noisy the step was; others are not.

    Args:
        backbone: decodes.
        scorers: reward models, each with `score_tensor` or at least `score`.
        batch_size: pictures decoded and scored at a time, at most; the parts are of equal size.
        evaluations: counts what was decoded.
    """

    reads_prediction = True

    def __init__(self, backbone: Backbone, scorers: Sequence[Any], batch_size: int, evaluations: Evaluations):
        self.backbone, self.scorers, self.batch_size = backbone, list(scorers), batch_size
        self.evaluations = evaluations
        self.scale = float(getattr(self.scorers[0], "preference_scale", 1.0))

    @property
    def is_differentiable(self) -> bool:
        """Tell whether the first reward model has a gradient."""
        return hasattr(self.scorers[0], "score_tensor")

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return scores [R,N] float32 of N clean latents."""
        chunks = -(-len(latents) // self.batch_size)
        parts = []
        for rows in torch.arange(len(latents), device=latents.device).tensor_split(chunks):  # no small last one
            images = self.backbone.decode_latents(latents[rows])
            self.evaluations.decoded += len(images)
            texts = [prompts[row] for row in rows.tolist()]
            parts.append(torch.stack([_score(s, images, texts, timesteps[rows]) for s in self.scorers]))
        return torch.cat(parts, dim=1).to(latents.device)

    def differentiable(self, latents: Tensor, prompts: Sequence[str], timesteps: Tensor) -> Tensor:
        """Return the scores [N] of N clean latents by the first reward model, with gradient, all at once."""
        self.evaluations.decoded += len(latents)
        return _score(self.scorers[0], self.backbone.decode_latents(latents), list(prompts), timesteps)


def pictures(images: Tensor) -> list[Image.Image]:
    """Return images [N,3,H,W] in [0, 1] as pictures of 8 bits."""
    arrays = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _score(scorer: Any, images: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
    if not hasattr(scorer, "score_tensor"):
        scores = torch.as_tensor(scorer.score(pictures(images), prompts)).float().to(images.device)
    elif "timesteps" in inspect.signature(scorer.score_tensor).parameters:
        scores = scorer.score_tensor(images, prompts, timesteps=timesteps).float()
    else:
        scores = scorer.score_tensor(images, prompts).float()
    if scores.shape != (len(images),):
        raise DataError(
            f'Scorer "{scorer.name}" returned shape {list(scores.shape)} for {len(images)} pictures, expected '
            f"[{len(images)}]."
        )
    return scores
