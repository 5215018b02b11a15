"""Build the parts of a run from its configuration: the model and the training step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffalign.backbones import inspection, loading
from diffalign.backbones.base import Backbone, move
from diffalign.config import Config
from diffalign.data.visits import RepeatedDraws
from diffalign.denoising import (
    GENERATING,
    INVERSIONS,
    FixedList,
    FrozenDenoiser,
    Inversion,
    LogitNormal,
    Mode,
    Shift,
    TimestepSampling,
    Uniform,
)
from diffalign.denoising.noising import INVERT_INSTEAD
from diffalign.errors import ConfigError
from diffalign.jobs.training import online_judges
from diffalign.jobs.training.networks import Reference, sampling_network, weights_dtype
from diffalign.training.auto_beta import AutoBeta
from diffalign.training.preference_step import Examples, PreferenceStep
from diffalign.training.reference_cache import ReferenceCache


def load_backbone(config: Config) -> Backbone:
    """Load the model of a run. Weights that train are float32; frozen ones take the precision of the run.

    The VAE stays float32: half precision is visible in its latents, and it runs once if latents are cached.
    """
    model = config.model
    check_path(config)
    backbone = loading.load(
        model.pretrained_model_name_or_path,
        vae=model.pretrained_vae_model_name_or_path,
        unet_init=model.unet_init,
        revision=model.revision,
        variant=model.variant,
        torch_dtype=weights_dtype(config),
        prediction_type=model.prediction_type,
        zero_terminal_snr=model.zero_terminal_snr,
        resolution=config.data.resolution,
    )
    if backbone.vae.dtype != torch.float32:
        move(backbone.vae, dtype=torch.float32)
    if config.data.long_prompts != "truncate":
        backbone.reading(config.data.long_prompts)
    return backbone


def check_path(config: Config) -> None:
    """Refuse models that follow another path than the settings need.

    Raises:
        ConfigError: such a model.
    """
    if config.data.long_prompts != "truncate":
        family = inspection.family_at(config.model.pretrained_model_name_or_path, config.model.revision)
        if fault := family.long_prompts_fault(config.data.long_prompts):
            raise ConfigError(f"data.long_prompts: {fault}")
    if config.is_online:
        check_online(config)
    elif config.noising == GENERATING:
        check_generating(config)


def check_generating(config: Config) -> None:
    """Refuse families of DDPM: only in a flow is the noise that a picture was drawn from the end of a straight line."""
    source, revision = config.model.pretrained_model_name_or_path, config.model.revision
    named = inspection.transformer_family(source)
    if (named is None or named.ddim_steps) and (family := inspection.family_at(source, revision)).ddim_steps:
        raise ConfigError(
            f'"{config.objective_name}" trains on the straight line between a picture and the noise that it was drawn '
            f"from, along which flow models draw; {family.family} is of DDPM. {INVERT_INSTEAD}"
        )


def check_online(config: Config) -> None:
    """Refuse objectives that learn from DDIM steps for families sampled otherwise, and judges that do not fit."""
    model = config.model
    family = inspection.family_at(model.pretrained_model_name_or_path, model.revision)
    if not family.ddim_steps:
        raise ConfigError(
            f'"{config.objective_name}" learns from DDIM steps, and {family.family} is sampled along a flow, without '
            "noise. Use an objective of given pictures, such as dpo, kto, mapo, smpo or rankdpo (docs/families.md)."
        )
    if family.denoiser_name != "unet" and online_judges.latent_reward_place(config) is not None:
        raise ConfigError(
            f"rollout.scorer {config.rollout.scorer} is half of a UNet, and {family.family} has none: its noisy "
            "latents are others. Use a reward model of pictures, such as pickscore."
        )


def preference_step(
    config: Config,
    backbone: Backbone,
    examples: Examples,
    reference: Reference | None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    stored: ReferenceCache | None = None,
) -> PreferenceStep:
    """Build the loss function of a run; `reduce` averages a tensor over processes, `stored` are reference errors."""
    denoising, loss = config.denoising, config.loss
    auto_beta = None
    if loss.auto_beta is not None:
        auto_beta = AutoBeta(loss.auto_beta, loss.auto_beta_decay, tuple(loss.auto_beta_limits), reduce)
    return PreferenceStep(
        backbone=backbone,
        pairs=RepeatedDraws(examples),
        objective=config.build_objective(),
        reference=reference.network if reference else None,
        seed=config.train.seed,
        noising=config.noising,
        inversion=inversion(config),
        inversion_network=_inversion_network(config, backbone, reference),
        timestep_low=denoising.timestep_low,
        timestep_high=denoising.timestep_high,
        sampling=timestep_sampling(config, backbone.shift_at(config.data.resolution)),
        snr_gamma=denoising.snr_gamma if denoising.snr_weighting == "min_snr" else None,
        anchor_weight=loss.anchor_weight,
        sft_weight=loss.sft_weight,
        auto_beta=auto_beta,
        total_steps=config.train.max_train_steps,
        stored=stored,
        random_flip=config.data.random_flip,
        proportion_empty_prompts=config.data.proportion_empty_prompts,
        reduce=reduce,
    )


def timestep_sampling(config: Config, shift: Shift) -> TimestepSampling:
    """Return how timesteps are drawn; `shift` is what the model's scheduler does, unless the settings say otherwise."""
    how = config.denoising
    densities = {
        "uniform": Uniform,
        "logit_normal": partial(LogitNormal, how.logit_mean, how.logit_std),
        "mode": partial(Mode, how.mode_scale),
        "list": partial(FixedList, tuple(how.timesteps or ())),
    }
    chosen = shift if how.timestep_shift is None else Shift(how.timestep_shift)
    return TimestepSampling(densities[how.timestep_density](), chosen)


def sampling_identity(config: Config, backbone: Backbone) -> dict[str, str]:
    """Return what weights and errors depend on of how timesteps are drawn; nothing if all are met alike."""
    sampling = timestep_sampling(config, backbone.shift_at(config.data.resolution))
    return {} if sampling == TimestepSampling() else {"timestep_sampling": repr(sampling)}


def inversion(config: Config) -> Inversion:
    """Return how latents are inverted."""
    how = config.inversion
    return Inversion(
        num_steps=how.num_steps,
        mode=how.mode,
        grid=how.grid,
        eta=how.eta,
        renoise_iterations=how.renoise_iterations if config.noising == "renoise_inversion" else 0,
        renoise_at=how.renoise_at,
    )


def _inversion_network(config: Config, backbone: Backbone, reference: Reference | None) -> FrozenDenoiser | None:
    """Return what is inverted, in batches of its own size; None if nothing is."""
    if config.noising not in INVERSIONS:
        return None
    size = config.inversion.batch_size
    if config.inversion.network == "policy":
        return sampling_network(config, backbone, size)
    assert reference is not None, "checked with the configuration"
    return replace(reference.network, micro_batch_size=size)
