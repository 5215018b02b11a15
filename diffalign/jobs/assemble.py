"""Build the parts of a run from its configuration: the model, the pairs, the reference, the training step."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from diffalign.backbones import adapters, loading
from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.data import LatentCache, OnlinePairs, PairSource, PairTransform, open_pairs
from diffalign.denoising import FrozenDenoiser
from diffalign.errors import ConfigError
from diffalign.training.preference_step import Pairs, PreferenceStep

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


def open_source(config: Config, error_log: Path | None = None) -> PairSource:
    """Open the preference pairs of a run."""
    data = config.data
    return open_pairs(
        data.dataset_name or data.train_data_dir,
        split=data.dataset_split_name,
        config_name=data.dataset_config_name,
        format=data.format,
        image_columns=tuple(data.image_columns),
        label_columns=tuple(data.label_columns),
        caption_column=data.caption_column,
        max_samples=data.max_train_samples,
        on_error=data.on_error,
        error_log=error_log,
    )


def open_training_pairs(config: Config, backbone: Backbone, source: PairSource, accelerator: Accelerator) -> Pairs:
    """Open the latent cache of a run, building what is missing of it, or encode online."""
    data = config.data
    transform = PairTransform(data.resolution, center_crop=not data.random_crop, random_flip=data.random_flip)
    backbone.offload_encoders(accelerator.device)
    if not data.cache_latents:
        return OnlinePairs(source, backbone, transform)
    # Every rank asks; one builds behind a file lock while the others wait there. A barrier would time out on real data.
    cache = LatentCache.build(
        source, backbone, transform, data.cache_dir, dtype=data.cache_dtype, batch_size=data.vae_encode_batch_size
    )
    backbone.offload_encoders("cpu")
    return cache


def prepare_networks(config: Config, backbone: Backbone, accelerator: Accelerator) -> FrozenDenoiser | None:
    """Make the denoiser trainable in place and return the reference, if the objective needs one.

    With LoRA the reference is the denoiser itself with its adapters off; otherwise a frozen copy. Both run under the
    policy's autocast, so that the first logits are exactly 0.
    """
    denoiser, lora = backbone.denoiser.to(accelerator.device), config.lora
    if config.train.enable_xformers_memory_efficient_attention:
        _use_xformers(denoiser)  # before it is copied: both must run the same kernels
    needs_reference = "reference" in config.build_objective().needs
    reference: FrozenDenoiser | None = None
    if config.model.tune == "lora":
        adapters.add_lora(
            denoiser, lora.rank, lora.lora_alpha, lora.lora_target_modules, lora.lora_dropout, seed=config.train.seed
        )
        if needs_reference:
            switch = adapters.adapter_switch(denoiser)
            reference = FrozenDenoiser(denoiser, backbone.predict, adapters_off=lambda _: switch())
    else:
        if needs_reference:
            frozen = copy.deepcopy(denoiser).requires_grad_(False).eval()
            _store_half(frozen, accelerator.mixed_precision)
            frozen = accelerator.prepare_model(frozen, evaluation_mode=True)
            reference = FrozenDenoiser(frozen, backbone.predict)
        denoiser.requires_grad_(True)
    if config.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return reference


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
    config: Config, backbone: Backbone, pairs: Pairs, reference: FrozenDenoiser | None
) -> PreferenceStep:
    """Build the loss function of a run."""
    return PreferenceStep(
        backbone=backbone,
        pairs=pairs,
        objective=config.build_objective(),
        reference=reference,
        seed=config.train.seed,
        noising=config.denoising.noising,
        timestep_low=config.denoising.timestep_low,
        timestep_high=config.denoising.timestep_high,
        random_flip=config.data.random_flip,
        proportion_empty_prompts=config.data.proportion_empty_prompts,
    )
