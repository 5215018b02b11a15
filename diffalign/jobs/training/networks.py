"""The networks of a run: the policy made trainable and fast, what anchors it, and what samples or is inverted."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from diffalign.backbones import adapters, export, quantization
from diffalign.backbones.attention import share_text, use_backend
from diffalign.backbones.attention_probe import attention_shapes, probe
from diffalign.backbones.base import Backbone
from diffalign.backbones.families import kind_of
from diffalign.backbones.fused_blocks import fuse_activations
from diffalign.backbones.fused_lora import fuse_lora
from diffalign.backbones.prefix import SharedPrefix
from diffalign.config import Config
from diffalign.denoising import FrozenDenoiser, acceleration, kernels
from diffalign.errors import ConfigError
from diffalign.training import sharding
from diffalign.training.moving_reference import MovingReference
from diffalign.training.reference_cache import ReferenceCache

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def weights_dtype(config: Config) -> torch.dtype:
    """Return the precision that a model is loaded in: weights that train are float32, frozen ones as the run is."""
    return HALF.get(config.train.mixed_precision, torch.float32) if config.model.tune == "lora" else torch.float32


# What selective checkpointing keeps: the results of matrix products, convolutions and attention. All else is cheap.
KEPT = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Hold the network that anchors a run, and what lets it follow the policy, if it does."""

    network: FrozenDenoiser
    moving: MovingReference | None = None


def prepare_networks(
    config: Config,
    backbone: Backbone,
    accelerator: Accelerator,
    checkpointing: str = "none",
    stored: ReferenceCache | None = None,
) -> Reference | None:
    """Make the denoiser trainable in place and return the reference, if the objective needs one.

    With LoRA the reference is the denoiser itself with its adapters off; otherwise a frozen copy. A reference that
    moves is the denoiser with other weights of its trained parameters. All run in the policy's precision unless
    performance.reference_dtype says otherwise, so that the first logits are exactly 0.

    checkpointing: which activations are recomputed, "none", "selective" or "full".
    stored: errors of the reference; once they are complete, no copy is made of what would never run.
    """
    denoiser, performance = place(config, backbone, accelerator.device), config.performance
    kernels.use(performance.kernels)
    acceleration.channels_last(denoiser, performance.channels_last)
    choose_attention(config, backbone)  # before it is copied: both must run the same kernels
    fuse_activations(denoiser, performance.fused_activations, performance.compile)
    frozen, referenced = None, "reference" in config.build_objective().needs
    if stored is not None and stored.complete and _has_a_copy(config):
        referenced = False
    if referenced and _has_a_copy(config):
        frozen = _frozen_copy(config, backbone, accelerator)
    if config.model.tune == "lora":
        add_adapters(config, denoiser)
        if performance.fused_lora:
            fuse_lora(denoiser)
        if config.model.quantization != "none":
            quantization.keep_from_ddp(denoiser)
    else:
        denoiser.requires_grad_(True)
        _keep_unread_from_ddp(denoiser)
    checkpoint_activations(denoiser, checkpointing)
    reference = _reference(config, backbone, frozen) if referenced else None
    for network in [denoiser] if frozen is None else [denoiser, frozen]:
        acceleration.compile_network(network, performance.compile, performance.cuda_graphs == "passes")
    return reference


def place(config: Config, backbone: Backbone, device: torch.device) -> nn.Module:
    """Move the denoiser, as it was loaded, to where it runs, its base quantised if the run wants that; return it."""
    if config.model.quantization != "none":
        quantization.quantize(backbone.denoiser, config.model.quantization, device)
    return backbone.denoiser.to(device)


def base_identity(config: Config) -> dict[str, str]:
    """Return what predictions of the base depend on that its weights as loaded do not show."""
    kind = config.model.quantization
    return {} if kind == "none" else {"quantization": kind}


def add_adapters(config: Config, denoiser: nn.Module) -> None:
    """Freeze `denoiser` and add the adapters of a run, as they are before the first step."""
    lora, family = config.lora, kind_of(denoiser)
    if lora.export_kohya:
        export.require_kohya(denoiser)  # and not after the last step
    adapters.add_lora(
        denoiser,
        lora.rank,
        lora.lora_alpha,
        lora.lora_target_modules or family.lora_targets,
        lora.lora_dropout,
        seed=config.train.seed,
        blocks=lora.blocks,
        idle=family.idle_layers(denoiser),
    )


def _keep_unread_from_ddp(denoiser: nn.Module) -> None:
    """Let DDP wait for no gradient of weights that none reaches: they stay as every process loaded them."""
    unread = {layer: denoiser.get_submodule(layer) for layer in kind_of(denoiser).unread_layers(denoiser)}
    names = [f"{layer}.{name}" for layer, part in unread.items() for name, _ in part.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, names)


def _has_a_copy(config: Config) -> bool:
    """Tell whether the reference has weights of its own."""
    full = config.model.tune == "full" and config.reference.update == "fixed"
    return full or config.performance.reference_dtype == "fp8"


def _frozen_copy(config: Config, backbone: Backbone, accelerator: Accelerator) -> nn.Module:
    frozen = copy.deepcopy(backbone.denoiser).requires_grad_(False).eval()
    if config.performance.reference_dtype == "fp8":
        acceleration.to_float8(frozen.to(torch.bfloat16))
        return frozen
    _store_half(frozen, accelerator.mixed_precision)
    sharding.shard(frozen, accelerator, backbone.repeated_blocks)
    return accelerator.prepare_model(frozen, evaluation_mode=True)


def _reference(config: Config, backbone: Backbone, frozen: nn.Module | None) -> Reference:
    denoiser, follow = backbone.denoiser, config.reference
    dtype = HALF.get(config.performance.reference_dtype)
    network = partial(FrozenDenoiser, predict=backbone.predict, dtype=dtype)
    if frozen is not None:
        return Reference(network(frozen))
    if follow.update != "fixed":
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        moving = MovingReference(trained, follow.update, follow.decay, follow.every)
        return Reference(network(denoiser, frozen_weights=moving.lent), moving)
    switch = adapters.adapter_switch(denoiser)
    both_run = config.reference.cache_draws is None and config.performance.compile != "full" and dtype is None
    prefix = SharedPrefix(denoiser) if both_run and "down" not in config.lora.blocks else None
    return Reference(network(denoiser, frozen_weights=lambda _: switch(), prefix=prefix))


def sampling_network(
    config: Config,
    backbone: Backbone,
    batch_size: int,
    frozen_weights: Callable[[nn.Module], AbstractContextManager[Any]] | None = None,
) -> FrozenDenoiser:
    """Return the policy without gradient, for inversions and rollouts of `batch_size` images a pass."""
    performance = config.performance
    return FrozenDenoiser(
        backbone.denoiser,
        backbone.predict,
        frozen_weights=frozen_weights,
        micro_batch_size=batch_size,
        dtype=HALF.get(performance.sampling_dtype),
        buckets=performance.sampling_buckets if performance.compile != "none" else 0,
    )


def checkpoint_activations(denoiser: nn.Module, kind: str) -> None:
    """Recompute activations in the backward pass: "none" of them, "selective" all but those of KEPT, "full" all."""
    if kind == "full":
        denoiser.enable_gradient_checkpointing()
    elif kind == "selective":
        contexts = partial(create_selective_checkpoint_contexts, list(_kept_operators()))

        def recompute(module: nn.Module, *args: Any) -> Any:
            return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

        denoiser.enable_gradient_checkpointing(recompute)


def _kept_operators() -> Iterable[Any]:
    for name in KEPT:
        if hasattr(torch.ops.aten, name):
            yield getattr(torch.ops.aten, name).default


def choose_attention(config: Config, backbone: Backbone) -> None:
    """Set the attention kernels of the denoiser as it was loaded, and whether images of an example share their text."""
    denoiser, performance = backbone.denoiser, config.performance
    if not backbone.plain_attention:
        _check_own_attention(config, backbone)
        return
    if config.train.enable_xformers_memory_efficient_attention:
        _use_xformers(denoiser)
        return
    name = performance.attention
    if name == "auto":
        side = config.data.resolution // backbone.vae_scale_factor
        shapes = attention_shapes(denoiser, side, side, backbone.tokenizers[0].model_max_length)
        device, dtype = next(denoiser.parameters()).device, HALF.get(config.train.mixed_precision, torch.float32)
        name = probe(device, dtype, shapes)
    if performance.fused_lora or performance.share_text or name != "default":
        use_backend(denoiser, name)
    if performance.share_text:
        share_text(denoiser)


def _check_own_attention(config: Config, backbone: Backbone) -> None:
    """Refuse kernels for the attention of a transformer over text and picture, which stays diffusers' own."""
    chosen = {
        "train.enable_xformers_memory_efficient_attention": config.train.enable_xformers_memory_efficient_attention,
        f"performance.attention {config.performance.attention}": config.performance.attention
        not in ("default", "auto"),
    }
    if refused := [key for key, is_set in chosen.items() if is_set]:
        raise ConfigError(
            f"{refused[0]} is for the attention of UNets; that of {backbone.family} is torch's own choice. Drop it."
        )


def _use_xformers(denoiser: nn.Module) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:  # not installed; or installed without a GPU
        raise no_xformers(error) from None


def no_xformers(why: object) -> ConfigError:
    """Return what to raise where xformers cannot be used."""
    return ConfigError(
        f"train.enable_xformers_memory_efficient_attention cannot be used here ({why}). "
        'Install it with pip install "diffalign[xformers]" on a GPU machine, or leave it off.'
    )


def _store_half(module: nn.Module, mixed_precision: str) -> None:
    """Store the weights of matrix products in half precision: autocast would cast them at every pass anyway.

    Norms stay float32, as autocast runs them; the predictions are the same bits, the copy is half as large.
    """
    if mixed_precision in HALF:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.to(HALF[mixed_precision])
