"""From the indices of some examples to their losses: where data, noising, networks and objective meet."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from diffalign import denoising
from diffalign.backbones.base import Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.quantization import dtype_of
from diffalign.data.batch import Augment, Augmentation, PreferenceBatch, sample_latents
from diffalign.data.visits import Visit, key_of
from diffalign.denoising import DenoisingBatch, DenoisingOutputs, FrozenDenoiser
from diffalign.errors import ConfigError
from diffalign.objectives.base import ListErrors, Objective, PairErrors, SingleErrors
from diffalign.training import preference_metrics
from diffalign.training.auto_beta import AutoBeta
from diffalign.training.hooks import StepHook
from diffalign.training.reference_cache import ReferenceCache

Errors = PairErrors | SingleErrors | ListErrors


class Examples(Protocol):
    """Serve training examples by index: a latent cache, encoding on the fly, or a view of either."""

    def batch(self, indices: list[int], augment: Augment) -> PreferenceBatch:
        """Return latents and embeddings of examples, augmented as `augment` says for their ids."""


@dataclass(frozen=True)
class Posed:
    """Hold the denoising problems of some examples."""

    batch: PreferenceBatch
    problem: DenoisingBatch
    cond: Conditioning
    reference_error: Tensor | None = None  # [N], where errors of the reference are stored
    hits: Tensor | None = None  # [B], the share of them that was known before
    progress: Tensor | None = None  # [], share of the run's steps that are done, where the objective asks

    def select(self, examples: Tensor) -> "Posed":
        """Return those of some examples [B], each with all its images."""
        count, images = len(self.batch), self.batch.images_per_example
        rows = torch.cat([examples + image * count for image in range(images)])
        cond = self.cond.select(rows)
        shared = cond.shared(images) if self.cond.copies > 1 else cond
        return Posed(self.batch.select(examples), self.problem.select(rows), shared)


@dataclass(kw_only=True)
class PreferenceStep(StepHook):
    """Compute the loss [B] and the metrics of B examples under a policy.

    All randomness is keyed by (seed, step, example id): flips, caption dropout, the sample from the VAE's posterior,
    noise and timesteps; an example that comes again in a step is a `Visit`, with an id of its own. The result for an
    example depends on nothing else in its batch, unless the objective has a `statistic`. With `stored`, the draw of a
    `Visit` takes the place of the step.

    Args:
        noising: a name of denoising.NOISINGS; None takes the objective's own.
        inversion: how latents are inverted, if the noising does that.
        inversion_network: the network that is inverted: the policy as it is, or the reference.
        sampling: how often timesteps between timestep_low and timestep_high are met; None: all alike, unshifted.
        snr_gamma: weigh errors by min-SNR with this gamma; None: all noise levels alike.
        anchor_weight: adds anchor_weight * mean (policy - reference)^2 of all images of an example.
        sft_weight: adds sft_weight * the policy's error on the first, best image.
        auto_beta: replaces the objective's beta.
        total_steps: optimizer steps of the run, for objectives that ask for the progress.
        stored: errors of the reference; all examples then come as `Visit`s. Without a
            `reference` they must be complete.
        reduce: averages a tensor over processes.
    """

    backbone: Backbone
    pairs: Examples
    objective: Objective
    reference: FrozenDenoiser | None
    seed: int
    noising: str | None = None
    inversion: denoising.Inversion = field(default_factory=denoising.Inversion)
    inversion_network: FrozenDenoiser | None = None
    timestep_low: int = 0
    timestep_high: int | None = None
    sampling: denoising.TimestepSampling | None = None
    snr_gamma: float | None = None
    anchor_weight: float = 0.0
    sft_weight: float = 0.0
    auto_beta: AutoBeta | None = None
    total_steps: int | None = None
    stored: ReferenceCache | None = None
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def __post_init__(self) -> None:
        self.noising = self.noising or self.objective.noising
        self._window: tuple[dict[tuple[int, int], int], Posed] | None = None

    def before_step(self, indices: list[int], step: int) -> None:
        """Invert the latents of all examples of this optimizer step at once: the policy does not change within it."""
        self._window = None
        if self.noising in denoising.INVERSIONS and indices:
            distinct = sorted({key_of(index): index for index in indices}.items())
            places = {key: place for place, (key, _) in enumerate(distinct)}
            self._window = places, self.pose(self.load([index for _, index in distinct], step), step)

    def __call__(self, policy: nn.Module, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses [B] with gradient and detached metrics of the examples at `indices`."""
        return self.evaluate(policy, self.prepare(indices, step))

    def prepare(self, indices: list[int], step: int) -> Posed:
        """Do what depends on indices, seed and step, and on the host: load, draw, noise or invert, look up."""
        drawn_at = step if self.stored is None else 0  # ids of RepeatedDraws hold the draw already
        posed = replace(self._posed(indices, drawn_at), progress=self._progress(step))
        if self.stored is None:
            return posed
        error, hits = self._stored_errors(posed, indices)
        return replace(posed, reference_error=error, hits=hits)

    def evaluate(self, policy: nn.Module, posed: Posed) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the networks and the objective. Without auto_beta this is a function of tensors: see StaticStep."""
        reference = self.reference if posed.reference_error is None else None
        outputs = denoising.denoising_step(self.backbone.predict, policy, posed.problem, posed.cond, reference)
        outputs = replace(outputs, reference_error=posed.reference_error)
        objective, errors = self.objective, self.measure(posed, outputs)
        if self.auto_beta is not None:
            objective = self.auto_beta.applied_to(objective)
            self.auto_beta.observe(errors.margin)
        statistic = objective.statistic(errors)
        if statistic is not None:
            errors = replace(errors, statistic=self.reduce(statistic))
        loss = objective.loss(errors)
        metrics = {"loss": loss.detach(), **preference_metrics.of(errors, objective)}
        if posed.hits is not None:
            metrics["reference_cache_hits"] = posed.hits
        if self.auto_beta is not None:
            metrics["beta"] = torch.full((), objective.beta, device=loss.device)
        return self._with_terms(loss, posed, outputs), metrics

    def fill(self, visits: list[Visit]) -> None:
        """Store the reference's errors of some examples and draws, without training."""
        self._stored_errors(self.pose(self.load(visits, 0), 0), visits)

    def _stored_errors(self, posed: Posed, visits: list[Visit]) -> tuple[Tensor, Tensor]:
        """Return the reference's errors [N] and the share [B] of them that was known before."""

        def evaluate(rows: Tensor) -> Tensor:
            assert self.reference is not None, "an incomplete cache needs a reference"
            rows = rows.to(posed.problem.xt.device)
            problem = posed.problem.select(rows)
            pred = self.reference(problem.xt, problem.timesteps, posed.cond.select(rows))
            return denoising.errors(DenoisingOutputs(policy=pred), problem)[0]  # reduced as the policy's are

        assert self.stored is not None
        return self.stored.errors(visits, evaluate, posed.problem.xt.device)

    def _progress(self, step: int) -> Tensor | None:
        """Return the share of the run that is done before a step, as a tensor: a recorded step holds no numbers."""
        if "progress" not in self.objective.needs:
            return None
        assert self.total_steps is not None, "the progress of a run needs total_steps"
        return torch.full((), step / self.total_steps, device=next(self.backbone.denoiser.parameters()).device)

    def _posed(self, indices: list[int], step: int) -> Posed:
        keys = [key_of(index) for index in indices]
        if self._window is None or not all(key in self._window[0] for key in keys):
            return self.pose(self.load(indices, step), step)
        places, posed = self._window
        rows = torch.tensor([places[key] for key in keys])
        return posed.select(rows.to(posed.problem.xt.device, non_blocking=True))

    def load(self, indices: list[int], step: int) -> PreferenceBatch:
        """Fetch examples with the augmentations drawn for them at this step, on the denoiser's device."""
        batch = self.pairs.batch(indices, partial(self._augment, step))
        if self.objective.chosen_only:
            batch = batch.winners()
        # Not blocking: the host would wait here until the GPU has done all that was asked of it before.
        return batch.to(next(self.backbone.denoiser.parameters()).device, non_blocking=True)

    def _augment(self, step: int, example_ids: Tensor) -> Augmentation:
        draw = partial(denoising.uniform, self.seed, step, example_ids)
        return Augmentation(
            flips=(draw("flip") < 0.5) & self.random_flip,
            drop_caption=draw("caption") < self.proportion_empty_prompts,
            crops=torch.stack([draw("crop_y"), draw("crop_x")], dim=1),
        )

    def pose(self, batch: PreferenceBatch, step: int) -> Posed:
        """Draw latents, timesteps and noise, or invert: the denoising problems of a batch and their conditioning."""
        path, ids, shape = self.backbone.path, batch.example_ids, batch.latent_mean.shape[1:]
        streams = ["posterior_w", "posterior_l", *(f"posterior_{i}" for i in range(2, batch.images_per_example))]
        streams = streams[: batch.images_per_example]
        posterior = torch.cat([denoising.normal(self.seed, step, ids, shape, stream) for stream in streams])
        window = self.timestep_low, self.timestep_high
        timesteps = denoising.sample_timesteps(path, self.seed, step, ids, *window, self.sampling)
        cond = self.backbone.condition(batch.text, batch.sizes)
        if batch.prompts == batch.prompts[: len(batch)] * batch.images_per_example:
            cond = cond.shared(batch.images_per_example)
        noises = batch.noises
        # To select from a list, the host would have to wait for the device.
        batch = replace(batch, prompts=[], noises=None)
        common = path, sample_latents(batch, posterior), timesteps, self.seed, step, ids
        dtype = dtype_of(self.backbone.denoiser)  # what `predict` would round xt to
        if self.noising in denoising.RANDOM_NOISINGS:
            return Posed(batch, denoising.RANDOM_NOISINGS[self.noising](*common, dtype=dtype), cond)
        if self.noising == denoising.GENERATING:
            noise = denoising.draw_noises(noises, shape).to(ids.device, non_blocking=True)
            return Posed(batch, denoising.generating(*common[:3], noise, dtype), cond)
        assert self.inversion_network is not None, f"{self.noising} needs a network to invert"
        problem = denoising.inverted(*common, network=self.inversion_network, cond=cond, how=self.inversion)
        return Posed(batch, problem, cond)

    def measure(self, posed: Posed, outputs: DenoisingOutputs) -> Errors:
        """Return what the objective is a function of."""
        return replace(self._errors(posed, outputs), progress=posed.progress)

    def _errors(self, posed: Posed, outputs: DenoisingOutputs) -> Errors:
        problem, batch, needs = posed.problem, posed.batch, self.objective.needs
        weight = None
        if self.snr_gamma is not None:
            weight = denoising.min_snr(self.backbone.path, problem.timesteps, self.snr_gamma)
        if self.objective.layout == "pair":
            return denoising.pair_errors(outputs, problem, batch.preference, needs=needs, weight=weight)
        if self.objective.layout == "list":
            return denoising.list_errors(outputs, problem, ranked_scores(batch), weight=weight)
        desirable = None if self.objective.chosen_only or batch.scores is None else batch.scores[:, 0] > 0.5
        mismatched = self._mismatched(posed) if "mismatched" in needs else None
        return denoising.single_errors(outputs, problem, desirable, mismatched=mismatched, weight=weight)

    def _mismatched(self, posed: Posed) -> DenoisingOutputs:
        """Predict with every image's prompt exchanged for its neighbour's, without gradient."""
        if len(posed.batch) < 2:
            raise ConfigError("Mismatched prompts need at least 2 images in train.train_batch_size, got 1.")
        assert self.reference is not None, "mismatched prompts are compared with the reference"
        problem = posed.problem
        cond = posed.cond.select(torch.arange(len(posed.batch), device=problem.xt.device).roll(1))
        policy = FrozenDenoiser(self.backbone.denoiser, self.backbone.predict)
        return DenoisingOutputs(
            policy=policy(problem.xt, problem.timesteps, cond),
            reference=self.reference(problem.xt, problem.timesteps, cond),
        )

    def _with_terms(self, loss: Tensor, posed: Posed, outputs: DenoisingOutputs) -> Tensor:
        """Weigh the losses [B] of examples that have a weight; add the terms that do not depend on the objective."""
        count = len(posed.batch)
        if posed.batch.weights is not None:
            loss = loss * posed.batch.weights
        if self.anchor_weight:
            loss = loss + self.anchor_weight * denoising.drift(outputs).view(-1, count).mean(0)
        if self.sft_weight:
            error, _ = denoising.errors(outputs, posed.problem)
            loss = loss + self.sft_weight * error[:count]
        return loss


def ranked_scores(batch: PreferenceBatch) -> Tensor:
    """Return the scores [B,k] of lists; a pair without scores is a list of two with 1 and 0."""
    if batch.scores is not None:
        return batch.scores
    if batch.images_per_example != 2:
        raise ConfigError("A ranking objective needs scores for every image of a list.")
    return torch.arange(1.0, -1.0, -1.0, device=batch.latent_mean.device).repeat(len(batch), 1)
