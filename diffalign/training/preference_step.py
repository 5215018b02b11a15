"""From the indices of some pairs to their losses: the one place where data, noising, networks and objective meet."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffalign import denoising
from diffalign.backbones.base import Backbone
from diffalign.data.batch import Augment, Augmentation, PairBatch, sample_latents
from diffalign.objectives.base import Objective, PairErrors

SATURATED = 3.0  # beyond this logit the gradient weight sigma(-logit) is below 5 %


class Pairs(Protocol):
    """Serve training pairs by index: a latent cache, or encoding on the fly."""

    def batch(self, indices: list[int], augment: Augment) -> PairBatch:
        """Return latents and embeddings of pairs, augmented as `augment` says for their example ids."""


@dataclass(frozen=True, kw_only=True)
class PreferenceStep:
    """Compute the loss [B] and the metrics of B pairs under a policy.

    All randomness is keyed by (seed, step, example id): flips, caption dropout, the sample from the VAE's posterior,
    noise and timesteps. The result for a pair depends on nothing else in its batch.
    """

    backbone: Backbone
    pairs: Pairs
    objective: Objective
    reference: denoising.FrozenDenoiser | None
    seed: int
    noising: str = "shared"
    timestep_low: int = 0
    timestep_high: int | None = None
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0

    def __call__(self, policy: nn.Module, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses [B] with gradient and detached metrics, each [B], of the pairs at `indices`."""
        batch = self.load(indices, step, next(policy.parameters()).device)
        problem, cond = self.pose(batch, step)
        outputs = denoising.denoising_step(self.backbone.predict, policy, problem, cond, self.reference)
        if self.objective.layout == "single":
            errors = denoising.single_errors(outputs, problem)
            loss = self.objective.loss(errors)
            return loss, {"loss": loss.detach(), "policy_error": errors.policy.detach()}
        errors = denoising.pair_errors(outputs, problem, batch.preference)
        loss = self.objective.loss(errors)
        return loss, {"loss": loss.detach(), **self._pair_metrics(errors)}

    def load(self, indices: list[int], step: int, device: torch.device) -> PairBatch:
        """Fetch pairs with the augmentations drawn for them at this step."""
        batch = self.pairs.batch(indices, partial(self._augment, step))
        if self.objective.chosen_only:
            batch = batch.winners()
        return batch.to(device)

    def _augment(self, step: int, example_ids: Tensor) -> Augmentation:
        draw = partial(denoising.uniform, self.seed, step, example_ids)
        return Augmentation(
            flips=(draw("flip") < 0.5) & self.random_flip,
            drop_caption=draw("caption") < self.proportion_empty_prompts,
            crops=torch.stack([draw("crop_y"), draw("crop_x")], dim=1),
        )

    def pose(self, batch: PairBatch, step: int) -> tuple[denoising.DenoisingBatch, Any]:
        """Draw latents, timesteps and noise: the denoising problems of a batch and their conditioning."""
        ids, shape = batch.example_ids, batch.latent_mean.shape[1:]
        streams = ("posterior_w",) if self.objective.chosen_only else ("posterior_w", "posterior_l")
        posterior = torch.cat([denoising.normal(self.seed, step, ids, shape, stream) for stream in streams])
        timesteps = denoising.sample_timesteps(
            self.backbone.path, self.seed, step, ids, self.timestep_low, self.timestep_high
        )
        noise = denoising.single if self.objective.chosen_only else denoising.NOISINGS[self.noising]
        problem = noise(self.backbone.path, sample_latents(batch, posterior), timesteps, self.seed, step, ids)
        return problem, self.backbone.condition(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.sizes)

    def _pair_metrics(self, errors: PairErrors) -> dict[str, Tensor]:
        metrics = {"policy_error": (errors.policy_w + errors.policy_l).detach() / 2}
        if hasattr(self.objective, "logit"):
            metrics["saturation"] = (self.objective.logit(errors).detach().abs() > SATURATED).float()
        if errors.reference_w is None:
            return metrics | {"raw_margin": (errors.policy_l - errors.policy_w).detach()}
        return metrics | {
            "implicit_accuracy": errors.implicit_accuracy,
            "margin": errors.margin.detach(),
            "chosen_drift": (errors.policy_w - errors.reference_w).detach(),
            "rejected_drift": (errors.policy_l - errors.reference_l).detach(),
        }
