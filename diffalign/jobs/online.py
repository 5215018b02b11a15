"""Objectives that sample while they train: their prompts, the reward model, the rollout and the training step."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.data import PairSampler
from diffalign.denoising import FrozenDenoiser, Rollout
from diffalign.errors import ConfigError
from diffalign.jobs import scorers
from diffalign.jobs.assemble import HALF, Reference
from diffalign.jobs.prompts import read_prompts
from diffalign.objectives.base import BACKPROPAGATIONS
from diffalign.rollout import (
    PerPromptTracker,
    PictureScorer,
    PromptEncoder,
    RewardGradients,
    Sampler,
    StepPairs,
    Trajectories,
    TrajectoryPairs,
    advantages,
)
from diffalign.training.moving_reference import MovingReference
from diffalign.training.online_step import OnlineStep, TransitionOrder
from diffalign.training.reward_step import RewardStep

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Collect = StepPairs | TrajectoryPairs | Trajectories


class PromptSource:
    """Hold the prompts of a run."""

    def __init__(self, file: str, limit: int | None = None):
        self.texts = read_prompts(file, limit)
        self.name = Path(file).name

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> str:
        """Word how many there are."""
        return f"{len(self)} prompts"

    def identify(self, cache: Path) -> dict[str, Any]:
        """Return what the prompts are; `cache` is for sources whose content is expensive to hash."""
        return {"prompts": hashlib.sha256("\n".join(self.texts).encode()).hexdigest()}


def open_prompts(config: Config) -> PromptSource:
    """Read the prompts of a run."""
    return PromptSource(config.data.prompts_file, config.data.max_train_samples)


def online_step(
    config: Config,
    backbone: Backbone,
    prompts: PromptSource,
    reference: Reference | None,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> OnlineStep:
    """Build the loss function of a run that samples for itself; `reduce` averages over processes.

    With mixed_precision bf16 the VAE decodes in bfloat16, since what it makes is only looked at by a reward model.
    """
    rollout, worth = config.rollout, SharedAdvantages(config)
    _prepare_vae(config, backbone)
    behavior = _moving_average(config, backbone)
    collect = _collector(config, backbone, device, worth, behavior)
    slots = rollout.transitions_per_prompt or collect.examples_per_prompt
    if slots > collect.examples_per_prompt:
        raise ConfigError(
            f"rollout.transitions_per_prompt {slots} is more than the {collect.examples_per_prompt} transitions that a "
            "prompt gives. Use null for all."
        )
    encode = PromptEncoder(backbone, config.data.resolution)

    def sample(indices: list[int], step: int) -> Rollout:
        backbone.offload_encoders(device)  # validation may have moved them away
        return collect(encode([prompts.texts[index] for index in indices], device), step)

    return OnlineStep(
        backbone=backbone,
        objective=config.build_objective(),
        reference=reference.network if reference else None,
        collect=sample,
        order=TransitionOrder(PairSampler(len(prompts), config.train.seed), slots, rollout.updates),
        seed=config.train.seed,
        guidance_scale=rollout.guidance_scale,
        eta=rollout.eta,
        grad_scale=rollout.grad_scale if rollout.likelihood == "score_matching" else None,
        behavior=behavior,
        state=worth.tracker,
        reduce=reduce,
    )


def reward_step(config: Config, backbone: Backbone, prompts: PromptSource, device: torch.device) -> RewardStep:
    """Build the loss function of a run that follows the gradient of a reward."""
    rollout = config.rollout
    _prepare_vae(config, backbone)
    sampler = _sampler(config, backbone)
    scorer = PictureScorer(backbone, load_scorers(config, device), rollout.decode_batch_size, sampler.evaluations)
    for judge in scorer.scorers:
        judge.module.requires_grad_(False)
    gradients = RewardGradients(
        sampler=sampler,
        predict=backbone.predict,
        scorer=scorer,
        kind=config.collect,
        one_step_range=tuple(rollout.one_step_range) if rollout.one_step_range else None,
        backprop_steps=rollout.backprop_steps,
        random_start=rollout.random_start,
    )
    encode = PromptEncoder(backbone, config.data.resolution)

    def rewards(policy: nn.Module, indices: list[int], step: int) -> Tensor:
        backbone.offload_encoders(device)  # validation may have moved them away
        return gradients(policy, encode([prompts.texts[index] for index in indices], device), step)

    return RewardStep(
        objective=config.build_objective(), rewards=rewards, order=PairSampler(len(prompts), config.train.seed)
    )


def _prepare_vae(config: Config, backbone: Backbone) -> None:
    if config.train.mixed_precision == "bf16":
        backbone.vae.to(HALF["bf16"])


def _moving_average(config: Config, backbone: Backbone) -> MovingReference | None:
    """Return the average of the policy that samples, if it is not the policy itself."""
    if config.rollout.ema_decay is None:
        return None
    trained = {name: parameter for name, parameter in backbone.denoiser.named_parameters() if parameter.requires_grad}
    return MovingReference(trained, "ema", config.rollout.ema_decay, every=1)


def _sampler(config: Config, backbone: Backbone, behavior: MovingReference | None = None) -> Sampler:
    """Build what samples: the policy as it is, or its average."""
    rollout = config.rollout
    side = config.data.resolution // backbone.vae_scale_factor
    network = FrozenDenoiser(
        backbone.denoiser,
        backbone.predict,
        frozen_weights=behavior.lent if behavior else None,
        micro_batch_size=rollout.sample_batch_size,
    )
    return Sampler(
        path=backbone.path,
        network=network,
        shape=(backbone.latent_channels, side, side),
        seed=config.train.seed,
        num_inference_steps=rollout.num_inference_steps,
        guidance_scale=rollout.guidance_scale,
        eta=rollout.eta,
        storage_dtype=DTYPES[rollout.latent_dtype],
    )


def _collector(
    config: Config,
    backbone: Backbone,
    device: torch.device,
    worth: "SharedAdvantages",
    behavior: MovingReference | None,
) -> Collect:
    """Build what samples and judges."""
    rollout, sampler = config.rollout, _sampler(config, backbone, behavior)
    judges = load_scorers(config, device)
    scorer = PictureScorer(backbone, judges, rollout.decode_batch_size, sampler.evaluations)
    if config.collect == "step_pairs":
        return StepPairs(
            sampler=sampler,
            scorer=scorer,
            num_candidates=rollout.num_candidates,
            divert_start_step=rollout.divert_start_step,
            num_inner_steps=rollout.num_inner_steps,
            threshold=rollout.threshold,
            threshold_high=rollout.threshold_high,
            resample=rollout.resample,
            keep_predictions=rollout.likelihood == "score_matching",
        )
    common = {"sampler": sampler, "scorer": scorer}
    if config.collect == "trajectory_pairs":
        return TrajectoryPairs(**common, samples_per_prompt=rollout.samples_per_prompt or 2)
    return Trajectories(**common, samples_per_prompt=rollout.samples_per_prompt or 1, advantages=worth)


def load_scorers(config: Config, device: torch.device) -> list[Any]:
    """Load the reward models that judge.

    Raises:
        ConfigError: the oracle, which is for measuring; or several where one is needed.
    """
    names = scorers.parse(config.rollout.scorer)
    if scorers.ORACLE in names:
        raise ConfigError(
            "The oracle measures what training did and must not be trained on. Use a reward model, e.g. "
            "rollout.scorer=pickscore=assets/tiny-pickscore."
        )
    if len(names) > 1 and config.collect != "trajectory_pairs":
        raise ConfigError(
            f"{config.collect} needs one reward model, got {', '.join(names)}. Name one in rollout.scorer, or use a "
            "weighted sum of several."
        )
    return scorers.load(config.rollout.scorer, str(device))


class SharedAdvantages:
    """Compare the rewards of all processes, so that their number makes no difference."""

    def __init__(self, config: Config):
        self.kind = config.rollout.advantages
        per_prompt = config.collect == "trajectories" and self.kind == "per_prompt"
        self.tracker = PerPromptTracker(config.rollout.buffer_size, config.rollout.min_count) if per_prompt else None

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Return the advantages [N] of this process's rewards [N]."""
        # The n-th trajectory of a prompt; a prompt that two processes share has the same rewards in both.
        keys = [(prompt, prompts[:place].count(prompt)) for place, prompt in enumerate(prompts)]
        gathered = dict(gather_object(list(zip(keys, rewards.tolist(), strict=True))))
        every = sorted(gathered)
        texts, values = [prompt for prompt, _ in every], torch.tensor([gathered[key] for key in every])
        if self.tracker is not None:
            worth = self.tracker.update(texts, values)
        elif self.kind == "group":
            worth = advantages.grouped(texts, values)
        else:
            worth = advantages.normalised(values)
        by_key = dict(zip(every, worth.tolist(), strict=True))
        return torch.tensor([by_key[key] for key in keys])


def images_with_gradient(config: Config) -> int:
    """Return how many images pass through the network with gradient for one transition or pair of them."""
    if config.collect in BACKPROPAGATIONS:
        steps = config.rollout.num_inference_steps
        through = {"one_step": 1, "last_steps": config.rollout.backprop_steps or steps}
        return through.get(config.collect, round(0.16 * steps)) * _branches(config)
    shared = config.collect == "trajectories" or (config.collect == "step_pairs" and not config.rollout.num_inner_steps)
    return (1 if shared else 2) * _branches(config)


def predictions_per_prompt(config: Config) -> int:
    """Return how many guided predictions the rollout of a prompt takes."""
    rollout = config.rollout
    steps = rollout.num_inference_steps
    if config.collect in BACKPROPAGATIONS:
        return steps - images_with_gradient(config) // _branches(config)
    if config.collect != "step_pairs":
        return steps * (rollout.samples_per_prompt or (2 if config.collect == "trajectory_pairs" else 1))
    # The first branch point predicts once; all later predictions are those of candidates.
    return rollout.divert_start_step + 1 + (steps - 1 - rollout.divert_start_step) * rollout.num_candidates


def passes(config: Config) -> str:
    """Word how many images pass through the network for one transition, the cost of a method."""
    images, sampled = images_with_gradient(config), predictions_per_prompt(config)
    if config.collect in BACKPROPAGATIONS:
        return f"about {images} images with gradient and {sampled * _branches(config)} without per drawn image"
    frozen = images if "reference" in config.build_objective().needs else 0
    return (
        f"{images} images with gradient and {frozen} without per transition; {sampled * _branches(config)} without per "
        "prompt and rollout"
    )


def _branches(config: Config) -> int:
    return 1 if config.rollout.guidance_scale == 1.0 else 2
