"""Objectives that sample while they train: their prompts, the reward model, the rollout and the training step."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffalign.backbones.base import Backbone, move
from diffalign.config import Config
from diffalign.data import PairSampler
from diffalign.data.visits import DistinctDraws
from diffalign.denoising import Rollout
from diffalign.errors import ConfigError, DataError
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training import human_labels, online_judges
from diffalign.jobs.training.networks import Reference, sampling_network
from diffalign.rollout import (
    HumanLabels,
    PerPromptTracker,
    PromptEncoder,
    RewardGradients,
    Sampler,
    StepPairs,
    Trajectories,
    TrajectoryPairs,
    advantages,
)
from diffalign.rollout.prompts import prompt_id
from diffalign.training.moving_reference import MovingReference
from diffalign.training.online_step import OnlineStep, TransitionOrder
from diffalign.training.reward_step import RewardStep

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Collect = StepPairs | TrajectoryPairs | Trajectories


class PromptSource:
    """Hold the prompts of a run; with labels, by prompt those of its pictures, the prompts that have some."""

    def __init__(self, file: str, limit: int | None = None, labels: Mapping[str, Sequence[float]] | None = None):
        self.texts, self.labels = read_prompts(file, limit), labels
        if labels is not None:
            self.texts = [text for text in dict.fromkeys(self.texts) if text in labels]
            if not self.texts:
                raise DataError(f"None of the {len(labels)} prompts that people judged is in {file}.")
        self.name = Path(file).name

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> str:
        """Word how many there are."""
        return f"{len(self)} prompts"

    def identify(self, cache: Path) -> dict[str, Any]:
        """Return what the prompts are; `cache` is for sources whose content is expensive to hash."""
        found: dict[str, Any] = {"prompts": hashlib.sha256("\n".join(self.texts).encode()).hexdigest()}
        return found if self.labels is None else found | {"labels": [self.labels[text] for text in self.texts]}


def open_prompts(config: Config, backbone: Backbone) -> PromptSource:
    """Read the prompts of a run, and what people said of the pictures that the model as loaded draws for them."""
    labels = human_labels.read(config, backbone)
    return PromptSource(config.data.prompts_file, config.data.max_train_samples, labels)


def online_step(
    config: Config,
    backbone: Backbone,
    prompts: PromptSource,
    reference: Reference | None,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> OnlineStep:
    """Build the loss function of a run that samples for itself; `reduce` averages over processes.

    The VAE may decode in bfloat16, since what it makes is only looked at by a reward model.
    """
    rollout, worth = config.rollout, SharedAdvantages(config)
    _prepare_vae(config, backbone)
    behavior = _moving_average(config, backbone)
    if prompts.labels is None:
        collect = _collector(config, backbone, device, worth, behavior)
    else:
        collect = _judged_by_people(config, backbone, reference, prompts.labels)
    order = transition_order(config, prompts.texts, collect.examples_per_prompt)
    encode = PromptEncoder(backbone, config.data.resolution)

    def sample(indices: list[int], step: int) -> Rollout:
        backbone.offload_encoders(device)  # validation may have moved them away
        key = step if prompts.labels is None else human_labels.STEP
        return collect(encode([prompts.texts[index] for index in indices], device, indices), key)

    return OnlineStep(
        backbone=backbone,
        objective=config.build_objective(),
        reference=reference.network if reference else None,
        collect=sample,
        order=order,
        seed=config.train.seed,
        guidance_scale=rollout.guidance_scale,
        eta=rollout.eta,
        grad_scale=rollout.grad_scale if rollout.likelihood == "score_matching" else None,
        behavior=behavior,
        state=worth.tracker,
        reduce=reduce,
    )


def transition_order(config: Config, prompts: Sequence[str], examples_per_prompt: int) -> TransitionOrder:
    """Return the order of the transitions of prompts, each of which gives so many.

    Raises:
        ConfigError: more of them are asked for, or they cannot be shared out over the updates.
    """
    rollout = config.rollout
    slots = rollout.transitions_per_prompt or examples_per_prompt
    if slots > examples_per_prompt:
        raise ConfigError(
            f"rollout.transitions_per_prompt {slots} is more than the {examples_per_prompt} transitions that a "
            "prompt gives. Use null for all."
        )
    return TransitionOrder(PairSampler(len(prompts), config.train.seed), slots, rollout.updates, prompt_ids(prompts))


def prompt_ids(prompts: Sequence[str]) -> np.ndarray:
    """Return what tells which prompts are the same, int64 [P]."""
    return np.array([prompt_id(prompt) for prompt in prompts], dtype=np.int64)


def reward_step(config: Config, backbone: Backbone, prompts: PromptSource, device: torch.device) -> RewardStep:
    """Build the loss function of a run that follows the gradient of a reward."""
    rollout = config.rollout
    _prepare_vae(config, backbone)
    sampler = make_sampler(config, backbone)
    scorer = online_judges.judge(config, backbone, device, sampler)
    if not scorer.is_differentiable:
        raise ConfigError(
            f'"{config.objective_name}" follows the gradient of a reward model with score_tensor(images, prompts); '
            f"rollout.scorer {rollout.scorer} has none. Use e.g. pickscore."
        )
    gradients = RewardGradients(
        sampler=sampler,
        predict=backbone.predict,
        scorer=scorer,
        kind=config.collect,
        one_step_range=tuple(rollout.one_step_range) if rollout.one_step_range else None,
        backprop_steps=rollout.backprop_steps,
        random_start=rollout.random_start,
        last_step_noises=rollout.last_step_noises,
    )
    encode = PromptEncoder(backbone, config.data.resolution)

    def rewards(policy: nn.Module, indices: list[int], step: int) -> Tensor:
        backbone.offload_encoders(device)  # validation may have moved them away
        return gradients(policy, encode([prompts.texts[index] for index in indices], device, indices), step)

    order = DistinctDraws(PairSampler(len(prompts), config.train.seed), prompt_ids(prompts.texts))
    return RewardStep(objective=config.build_objective(), rewards=rewards, order=order)


def _prepare_vae(config: Config, backbone: Backbone) -> None:
    dtype = config.rollout.decode_dtype or ("bfloat16" if config.train.mixed_precision == "bf16" else None)
    if dtype is not None:
        move(backbone.vae, dtype=DTYPES[dtype])


def _moving_average(config: Config, backbone: Backbone) -> MovingReference | None:
    """Return the average of the policy that samples, if it is not the policy itself."""
    if config.rollout.ema_decay is None:
        return None
    trained = {name: parameter for name, parameter in backbone.denoiser.named_parameters() if parameter.requires_grad}
    return MovingReference(trained, "ema", config.rollout.ema_decay, every=1)


def make_sampler(config: Config, backbone: Backbone, behavior: MovingReference | None = None) -> Sampler:
    """Build what samples: the policy as it is, or its average."""
    rollout = config.rollout
    lent = behavior.lent if behavior else None
    network = sampling_network(config, backbone, rollout.sample_batch_size, lent)
    return Sampler(
        path=backbone.path,
        network=network,
        shape=backbone.latent_shape(config.data.resolution),
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
    rollout, sampler = config.rollout, make_sampler(config, backbone, behavior)
    scorer = online_judges.judge(config, backbone, device, sampler)
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
            timesteps_of=rollout.timesteps_of,
            keep_predictions=rollout.likelihood == "score_matching",
            guidance=online_judges.guidance(config, sampler, scorer),
        )
    common = {"sampler": sampler, "scorer": scorer, **_trajectories(config, sampler)}
    if config.collect == "trajectory_pairs":
        return TrajectoryPairs(**common, samples_per_prompt=rollout.samples_per_prompt or 2, pairs=rollout.pairs)
    return Trajectories(**common, samples_per_prompt=rollout.samples_per_prompt or 1, advantages=worth)


def _judged_by_people(
    config: Config, backbone: Backbone, reference: Reference, labels: Mapping[str, Sequence[float]]
) -> TrajectoryPairs:
    """Build what draws the trajectories of judged pictures again: with the network that drew them."""
    sampler = make_sampler(config, backbone)
    network, size = reference.network, config.rollout.sample_batch_size
    sampler.network = replace(network, micro_batch_size=size, dtype=sampler.network.dtype, prefix=None)
    return TrajectoryPairs(
        sampler=sampler,
        scorer=HumanLabels(labels),
        samples_per_prompt=human_labels.copies(config),
        pairs=config.rollout.pairs,
        **_trajectories(config, sampler),
    )


def _trajectories(config: Config, sampler: Sampler) -> dict[str, Any]:
    """Return where whole trajectories start and which of their steps are learnt from."""
    steps = sampler.steps_within(config.denoising.timestep_low, config.denoising.timestep_high)
    return {"shared_noise": config.shared_noise, "learnt_steps": steps}


class SharedAdvantages:
    """Compare the rewards of all processes, so that their number makes no difference."""

    def __init__(self, config: Config):
        self.kind = config.rollout.advantages
        per_prompt = config.collect == "trajectories" and self.kind == "per_prompt"
        self.tracker = PerPromptTracker(config.rollout.buffer_size, config.rollout.min_count) if per_prompt else None

    def __call__(self, prompts: Sequence[str], ids: Sequence[int], rewards: Tensor) -> Tensor:
        """Return the advantages [N] of this process's rewards [N]."""
        # The n-th trajectory under an id; a prompt that two processes share has the same rewards in both.
        places = enumerate(zip(prompts, ids, strict=True))
        keys = [(prompt, drawn, ids[:place].count(drawn)) for place, (prompt, drawn) in places]
        gathered = dict(gather_object(list(zip(keys, rewards.tolist(), strict=True))))
        every = sorted(gathered)
        texts, values = [prompt for prompt, *_ in every], torch.tensor([gathered[key] for key in every])
        if self.tracker is not None:
            worth = self.tracker.update(texts, values)
        elif self.kind == "group":
            worth = advantages.grouped(texts, values)
        else:
            worth = advantages.normalised(values)
        by_key = dict(zip(every, worth.tolist(), strict=True))
        return torch.tensor([by_key[key] for key in keys])
