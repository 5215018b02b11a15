"""Build the parts of a run from its configuration: the model, the reference, the training step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.backbones import adapters, loading
from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.denoising import INVERSIONS, FrozenDenoiser, Inversion
from diffalign.errors import ConfigError
from diffalign.training.auto_beta import AutoBeta
from diffalign.training.moving_reference import MovingReference
from diffalign.training.preference_step import Examples, PreferenceStep

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(config: Config, mixed_precision: str) -> Backbone:
    """Load the model of a run. Weights that train are float32; frozen ones take the precision of the run.

    The VAE stays float32: half precision is visible in its latents, and it runs once if latents are cached.
    """
    model = config.model
    half = HALF.get(mixed_precision, torch.float32)
    backbone = loading.load(
        model.pretrained_model_name_or_path,
        vae=model.pretrained_vae_model_name_or_path,
        unet_init=model.unet_init,
        revision=model.revision,
        variant=model.variant,
        torch_dtype=half if model.tune == "lora" else torch.float32,
        prediction_type=model.prediction_type,
        zero_terminal_snr=model.zero_terminal_snr,
    )
    if backbone.vae.dtype != torch.float32:
        backbone.vae.to(torch.float32)
    return backbone


@dataclass(frozen=True)
class Reference:
    """Hold the network that anchors a run, and what lets it follow the policy, if it does."""

    network: FrozenDenoiser
    moving: MovingReference | None = None


def prepare_networks(config: Config, backbone: Backbone, accelerator: Accelerator) -> Reference | None:
    """Make the denoiser trainable in place and return the reference, if the objective needs one.

    With LoRA the reference is the denoiser itself with its adapters off; otherwise a frozen copy. A reference that
    moves is the denoiser with other weights of its trained parameters. All run under the policy's autocast, so that the
    first logits are exactly 0.
    """
    denoiser, lora = backbone.denoiser.to(accelerator.device), config.lora
    if config.train.enable_xformers_memory_efficient_attention:
        _use_xformers(denoiser)  # before it is copied: both must run the same kernels
    if config.model.tune == "lora":
        adapters.add_lora(
            denoiser, lora.rank, lora.lora_alpha, lora.lora_target_modules, lora.lora_dropout, seed=config.train.seed
        )
    else:
        denoiser.requires_grad_(True)
    reference = _reference(config, backbone, accelerator) if "reference" in config.build_objective().needs else None
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return reference


def _reference(config: Config, backbone: Backbone, accelerator: Accelerator) -> Reference:
    denoiser, follow = backbone.denoiser, config.reference
    if follow.update != "fixed":
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        moving = MovingReference(trained, follow.update, follow.decay, follow.every)
        return Reference(FrozenDenoiser(denoiser, backbone.predict, frozen_weights=moving.lent), moving)
    if config.model.tune == "lora":
        switch = adapters.adapter_switch(denoiser)
        return Reference(FrozenDenoiser(denoiser, backbone.predict, frozen_weights=lambda _: switch()))
    frozen = copy.deepcopy(denoiser).requires_grad_(False).eval()
    _store_half(frozen, accelerator.mixed_precision)
    return Reference(FrozenDenoiser(accelerator.prepare_model(frozen, evaluation_mode=True), backbone.predict))


def _use_xformers(denoiser: nn.Module) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:  # not installed; or installed without a GPU
        raise ConfigError(
            f"train.enable_xformers_memory_efficient_attention cannot be used here ({error}). "
            'Install it with pip install "diffalign[xformers]" on a GPU machine, or leave it off.'
        ) from None


def _store_half(module: nn.Module, mixed_precision: str) -> None:
    """Store the weights of matrix products in half precision: autocast would cast them at every pass anyway.

    Norms stay float32, as autocast runs them; the predictions are the same bits, the copy is half as large.
    """
    if mixed_precision in HALF:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.to(HALF[mixed_precision])


def preference_step(
    config: Config,
    backbone: Backbone,
    examples: Examples,
    reference: Reference | None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> PreferenceStep:
    """Build the loss function of a run; `reduce` averages a tensor over processes."""
    denoising, loss = config.denoising, config.loss
    auto_beta = None
    if loss.auto_beta is not None:
        auto_beta = AutoBeta(loss.auto_beta, loss.auto_beta_decay, tuple(loss.auto_beta_limits), reduce)
    return PreferenceStep(
        backbone=backbone,
        pairs=examples,
        objective=config.build_objective(),
        reference=reference.network if reference else None,
        seed=config.train.seed,
        noising=config.noising,
        inversion=inversion(config),
        inversion_network=_inversion_network(config, backbone, reference),
        timestep_low=denoising.timestep_low,
        timestep_high=denoising.timestep_high,
        snr_gamma=denoising.snr_gamma if denoising.snr_weighting == "min_snr" else None,
        anchor_weight=loss.anchor_weight,
        sft_weight=loss.sft_weight,
        auto_beta=auto_beta,
        random_flip=config.data.random_flip,
        proportion_empty_prompts=config.data.proportion_empty_prompts,
        reduce=reduce,
    )


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
        return FrozenDenoiser(backbone.denoiser, backbone.predict, micro_batch_size=size)
    assert reference is not None, "checked with the configuration"
    return replace(reference.network, micro_batch_size=size)
