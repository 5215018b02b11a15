"""What a training step keeps on one device, and whether activations have to be recomputed to make it fit."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from diffalign.backbones import quantization
from diffalign.config import Config
from diffalign.jobs.training import online_costs
from diffalign.training.batching import BatchPlan

GIB = 2**30
BYTES = {"no": 4, "bf16": 2, "fp16": 2}
# Optimizer state per trained parameter, bytes: two float32 moments, two bytes, a factored second moment.
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0.1}
# Saved activations of one image at the native resolution, GiB, counted on meta tensors (docs/performance.md). They grow
# with the area of the image; float32 doubles what autocast keeps.
NATIVE = dict.fromkeys(("sdxl", "sd3", "flux", "flux2", "lumina2", "qwen", "sana", "zimage"), 1024) | {"sd15": 512}
NATIVE |= dict.fromkeys(("pixart-alpha", "pixart-sigma"), 1024)
ACTIVATIONS = {
    "sdxl": {"pure": 5.28, "lora": 7.25, "full": 8.56, "checkpointed": 0.5},
    "sd15": {"pure": 0.76, "lora": 1.08, "full": 1.35, "checkpointed": 0.14},
    # SD3.5-medium's; half as much for SD3-medium, which has no second attention and no norms of queries and keys.
    "sd3": {"pure": 8.32, "lora": 12.08, "full": 12.08, "checkpointed": 0.34},
    "flux": {"pure": 27.1, "lora": 39.2, "full": 39.2, "checkpointed": 1.5},
    # FLUX.2-klein-base-4B's; those of the larger ones are as much more as they have heads in all layers, within 2 %.
    "flux2": {"pure": 16.4, "lora": 17.8, "full": 22.7, "checkpointed": 0.71},
    "lumina2": {"pure": 21.4, "lora": 21.5, "full": 36.3, "checkpointed": 2.0},
    "pixart-alpha": {"pure": 4.73, "lora": 4.76, "full": 8.32, "checkpointed": 0.26},
    "pixart-sigma": {"pure": 4.76, "lora": 4.78, "full": 8.35, "checkpointed": 0.26},
    "qwen": {"pure": 32.1, "lora": 38.3, "full": 53.9, "checkpointed": 1.5},
    # Of all weights, 3.0 of these are their copies in bfloat16, which do not grow.
    "sana": {"pure": 3.33, "lora": 3.02, "full": 6.87, "checkpointed": 0.09},
    "zimage": {"pure": 33.6, "lora": 37.6, "full": 55.0, "checkpointed": 1.0},
}
SELECTIVE = 0.6  # share that remains when norms, activations and casts are recomputed; an estimate
NATIVE_WIDTH = 320  # channels of the first block of the published UNets: of other sizes nothing is known
# Channels of a head, and layers times heads, of SD3.5-medium, FLUX.1-dev, FLUX.2-klein-base-4B, Lumina-Image 2.0, both
# PixArts, Qwen-Image and SANA-1.6B.
HEADS = {
    "sd3": (64, 24 * 24),
    "flux": (128, (19 + 38) * 24),
    "flux2": (128, (5 + 20) * 24),
    "lumina2": (96, 26 * 24),
    "pixart-alpha": (72, 28 * 16),
    "pixart-sigma": (72, 28 * 16),
    "qwen": (128, 60 * 24),
    "sana": (32, 20 * 70),
}
NATIVE_ZIMAGE = {"dim": 3840, "n_heads": 30}  # and 30 layers
# Tokens of text and, at the native resolution, of the picture: both go through all of FLUX, Lumina-Image 2.0 and
# Qwen-Image (of these two a prompt is as long as it is). Those of SD3 and the 300 of SANA are counted as if they grew
# with the picture.
TOKENS = {"flux": (512, 4096), "flux2": (512, 4096), "lumina2": (128, 4096), "qwen": (128, 4096)}
HEADROOM = 0.9  # of a device's memory; the rest goes to workspaces and fragmentation
# Images of an example that pass with gradient; how long the lists are is only known from the data. Of transitions it
# depends on the rollout: see `online_costs.images_with_gradient`.
IMAGES = {"single": 1, "pair": 2, "list": 4}

Kind = Literal["none", "selective", "full"]
KINDS: tuple[Kind, ...] = ("none", "selective", "full")  # of recomputation, from the fastest to the smallest


@dataclass(frozen=True)
class Counts:
    """Hold what the estimate depends on of a model."""

    family: str
    denoiser: nn.Module
    total: int  # parameters
    trained: int
    encoders: float = 0.0  # bytes of the VAE and the text encoders as they are loaded, as far as they are known

    def encoders_fit(self, available: float) -> bool:
        """Tell whether the encoders alone fit into `available` GiB."""
        return self.encoders / GIB <= HEADROOM * available


@dataclass(frozen=True)
class MemoryPlan:
    """Estimate the memory of one device, in GiB; activations are None where nothing is known about the model."""

    weights: float
    reference: float
    gradients: float
    optimizer: float
    activations: float | None
    encoders: float = 0.0  # which leave the device before training where latents and prompts are cached

    @property
    def total(self) -> float:
        """Return the sum of what is known."""
        fixed = self.weights + self.reference + self.gradients + self.optimizer + self.encoders
        return fixed + (self.activations or 0.0)


@dataclass(frozen=True)
class Checkpointing:
    """Say which activations are recomputed, and why."""

    kind: Kind
    why: str


def checkpointing(config: Config, plan: BatchPlan, counts: Counts, available: float | None = None) -> Checkpointing:
    """Decide what is recomputed: what the configuration says; of auto, as little as fits into `available` GiB.

    `available` is the memory of this machine's GPU if None. Without a GPU, or for a model of unknown size, nothing is.
    """
    wanted = config.train.gradient_checkpointing
    if wanted != "auto":
        kind: Kind = "selective" if wanted == "selective" else "full" if wanted else "none"
        return Checkpointing(kind, f"{kind}, as configured")
    available = device_memory() if available is None else available
    if available is None:
        return Checkpointing("none", "none: there is no GPU whose memory could be short")
    plans = {kind: estimate(config, plan, counts, kind) for kind in KINDS}
    if plans["none"].activations is None:
        return Checkpointing("none", "none: activations are not estimated for this size of model")
    room = HEADROOM * available
    for kind, needed in plans.items():
        if needed.total <= room:
            return Checkpointing(kind, f"{kind}: about {needed.total:.1f} of {room:.1f} GiB")
    least = plans["full"].total
    return Checkpointing("full", f"full, and even so about {least:.1f} GiB of {room:.1f}: lower train.train_batch_size")


def largest_batch(config: Config, counts: Counts, kind: Kind, available: float) -> int | None:
    """Return the largest train_batch_size that fits into `available` GiB, 0 if none does; None if that is not known."""
    one = estimate(config, BatchPlan(1, 1, 1), counts, kind)
    if one.activations is None:
        return None
    fixed = one.total - one.activations
    return max(int((HEADROOM * available - fixed) / one.activations), 0)


def device_memory() -> float | None:
    """Return the memory of this process's GPU in GiB, None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB


def estimate(config: Config, plan: BatchPlan, counts: Counts, kind: Kind) -> MemoryPlan:
    """Estimate what a step keeps on one device (weights that train and their gradients are float32).

    What FSDP shares out is counted whole.
    """
    full = config.model.tune == "full"
    average = 4 if config.optimizer.use_ema else 0
    return MemoryPlan(
        weights=(4 * counts.total if full else _frozen_bytes(config, counts) + 4 * counts.trained) / GIB,
        reference=_reference_bytes(config, counts) / GIB,
        gradients=4 * counts.trained / GIB,
        optimizer=(STATE_BYTES[config.optimizer.name] + average) * counts.trained / GIB,
        activations=_activations(config, plan, counts, kind),
        encoders=0.0 if config.data.cache_latents and not config.is_online else counts.encoders / GIB,
    )


def grids_fit(config: Config, counts: Counts, available: float) -> bool:
    """Tell whether the encoders fit beside all that a step keeps but its activations, as when a grid is drawn."""
    if config.validation.validation_steps is None:
        return True
    step = estimate(config, BatchPlan(1, 1, 1), counts, "full")
    kept = step.total - step.encoders - (step.activations or 0.0)
    return kept + counts.encoders / GIB <= HEADROOM * available


def _frozen_bytes(config: Config, counts: Counts) -> float:
    """Return the bytes of the base of a LoRA run; a quantised one has its largest layer in half precision as well."""
    half, kind = BYTES[config.train.mixed_precision], config.model.quantization
    if kind == "none":
        return half * counts.total
    layers = [layer for _, layer in quantization.linear_layers(counts.denoiser)]
    numbers = [layer.in_features * layer.out_features for layer in layers]
    kept = sum(quantization.stored_bytes(layer, kind) for layer in layers)
    return kept + half * (counts.total - sum(numbers) + max(numbers, default=0))


def _reference_bytes(config: Config, counts: Counts) -> float:
    """Return the bytes of what the reference holds besides the policy's weights."""
    if "reference" not in config.build_objective().needs:
        return 0.0
    if config.performance.reference_dtype == "fp8":
        return counts.total
    if config.reference.update != "fixed":
        return 4 * counts.trained
    return BYTES[config.train.mixed_precision] * counts.total if config.model.tune == "full" else 0.0


def _activations(config: Config, plan: BatchPlan, counts: Counts, kind: Kind) -> float | None:
    size = _relative_size(counts)
    if size is None:
        return None
    known = ACTIVATIONS[counts.family]
    kept = known["full" if config.model.tune == "full" else "pure" if config.pure_bf16 else "lora"]
    image = {"none": kept, "selective": SELECTIVE * kept, "full": known["checkpointed"]}[kind]
    text, picture = TOKENS.get(counts.family, (0, 1))
    area = (config.data.resolution / NATIVE[counts.family]) ** 2
    scale = size * (text + picture * area) / (text + picture)
    scale *= 2 if config.train.mixed_precision == "no" else 1
    return image * scale * plan.train_batch_size * _images(config)


def _relative_size(counts: Counts) -> float | None:
    """Return how large a network is, in those that were counted; None if nothing is known about such a one."""
    shape = counts.denoiser.config
    if counts.family not in ACTIVATIONS:
        return None
    if "block_out_channels" in shape:
        return 1.0 if shape["block_out_channels"][0] == NATIVE_WIDTH else None
    if "n_layers" in shape:
        return shape["n_layers"] / 30 if NATIVE_ZIMAGE.items() <= dict(shape).items() else None
    channels, native = HEADS[counts.family]
    heads = (shape["num_layers"] + shape.get("num_single_layers", 0)) * shape["num_attention_heads"]
    width = shape.get("attention_head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return heads / native if width == channels else None


def _images(config: Config) -> int:
    """Return how many images of an example pass with gradient."""
    return online_costs.images_with_gradient(config) if config.is_online else IMAGES[config.build_objective().layout]


def describe(plan: MemoryPlan) -> str:
    """Word an estimate."""
    parts = [f"weights {plan.weights:.2f}", f"gradients {plan.gradients:.2f}", f"optimizer {plan.optimizer:.2f}"]
    if plan.reference:
        parts.insert(1, f"reference {plan.reference:.2f}")
    if plan.encoders:
        parts.append(f"encoders {plan.encoders:.2f}")
    if plan.activations is None:
        return f"about {plan.total:.2f} GiB ({', '.join(parts)}), activations not estimated for this size of model"
    return f"about {plan.total:.1f} GiB ({', '.join(parts)}, activations {plan.activations:.2f})"
