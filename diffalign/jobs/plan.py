"""`diffalign train --dry-run`: what a run would do, without loading weights or data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch import nn

from diffalign import config as configuration
from diffalign.backbones import adapters, loading, published, single_file
from diffalign.config import Config
from diffalign.denoising import INVERSIONS, DDPMPath, inversion
from diffalign.errors import ModelError
from diffalign.jobs import assemble, online
from diffalign.objectives.base import UNITS
from diffalign.training import optimizer
from diffalign.training.batching import BatchPlan

GIB = 2**30
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BYTES = {"no": 4, "bf16": 2, "fp16": 2}
# Optimizer state per trained parameter, bytes: two float32 moments, two bytes, a factored second moment.
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0.1}
# Saved activations of one image at the native resolution, GiB: (LoRA, full) under autocast, then with checkpointing.
# Counted on meta tensors, see docs/performance.md; they grow with the area of the image.
ACTIVATIONS = {"sdxl": (1024, 7.25, 8.56, 0.5), "sd15": (512, 1.08, 1.35, 0.14)}
# Images of an example that pass with gradient; how long the lists are is only known from the data. Of transitions it
# depends on the rollout: see `online.images_with_gradient`.
IMAGES = {"single": 1, "pair": 2, "list": 4}
NATIVE_WIDTH = {"sdxl": 320, "sd15": 320}


@dataclass(frozen=True)
class MemoryPlan:
    """Estimate the memory of one device, in GiB; activations are None where nothing is known about the model."""

    weights: float
    reference: float
    gradients: float
    optimizer: float
    activations: float | None

    @property
    def total(self) -> float:
        """Return the sum of what is known."""
        return self.weights + self.reference + self.gradients + self.optimizer + (self.activations or 0.0)


def show(config: Config, console: Console) -> None:
    """Print the resolved configuration, the batch arithmetic, the learning rate, parameters and memory."""
    console.print(Syntax(configuration.dump(config), "yaml", background_color="default"))
    world_size = max(torch.cuda.device_count(), 1)
    plan = BatchPlan.of(config.train, world_size)
    rate = optimizer.peak_learning_rate(config.optimizer, plan.global_batch_size)
    denoiser, family, source = skeleton(config)
    total, trained = _parameters(config, denoiser)
    memory = estimate_memory(config, plan, family, denoiser, total, trained)
    table = Table(show_header=False, box=None, pad_edge=False)
    unit = UNITS[config.build_objective().layout]
    rows = {
        "objective": repr(config.build_objective()),
        "batch": plan.describe(unit),
        f"{unit} seen": f"{plan.global_batch_size * config.train.max_train_steps:,}",
        "network passes": passes(config),
        "learning rate": f"{rate:.4g} after {config.optimizer.lr_warmup_steps} warm-up steps",
        "model": f"{family}, {total:,} parameters ({source})",
        "trained": f"{trained:,} parameters ({trained / total:.2%})",
        "memory": _describe(memory),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


def passes(config: Config) -> str:
    """Word how many images pass through the network for one example, the cost of a method."""
    objective = config.build_objective()
    if config.is_online:
        return online.passes(config)
    images, mismatched = IMAGES[objective.layout], 2 if "mismatched" in objective.needs else 0
    frozen = float(images * (("reference" in objective.needs) + mismatched))
    note = f" (lists counted as {images} images)" if objective.layout == "list" else ""
    if config.noising in INVERSIONS:
        how, path = assemble.inversion(config), DDPMPath.from_config(STABLE_DIFFUSION)
        low, high = config.denoising.timestep_low, config.denoising.timestep_high or path.num_train_timesteps
        steps = inversion.plan(path, torch.arange(low, high), how).count.double().mean().item()
        frozen += images * steps * (1 + how.renoise_iterations)
        note += f", of them {frozen - images:.1f} for the inversion"
    return f"{images} images with gradient and {frozen:.3g} without per example{note}"


def skeleton(config: Config) -> tuple[nn.Module, str, str]:
    """Return the denoiser without weights, its family, and where its shape was read. Nothing is downloaded.

    A hub model that is not in the local cache counts as the published SDXL base or SD1.5, by its name; a single file
    does so by the names of its tensors.

    Raises:
        ModelError: a path that does not exist, or a folder that is no pipeline of a supported family.
    """
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    if Path(name).is_dir():
        family = loading.PIPELINES[loading.read_index(name)["_class_name"]].family
        return _on_meta(Path(name) / "unet" / "config.json"), family, "from its config"
    if Path(name).is_file():
        family = "sdxl" if single_file.family_of(Path(name)) == "sdxl" else "sd15"
        return published.random_unet(family, device="meta"), family, f"counted as the published {family}"
    if name.count("/") != 1:
        raise ModelError(f'There is no model at "{name}". Give a diffusers folder, a .safetensors file or a hub id.')
    family = "sdxl" if "xl" in name.lower() else "sd15"
    cached = try_to_load_from_cache(name, "unet/config.json", revision=revision)
    if isinstance(cached, str):
        return _on_meta(Path(cached)), family, "from its config in the hub cache"
    return published.random_unet(family, device="meta"), family, f"not read; counted as the published {family}"


def _on_meta(file: Path) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(file))


def _parameters(config: Config, denoiser: nn.Module) -> tuple[int, int]:
    total = sum(p.numel() for p in denoiser.parameters())
    if config.model.tune == "full":
        return total, total
    lora = config.lora
    trained = adapters.add_lora(denoiser, lora.rank, lora.lora_alpha, lora.lora_target_modules)
    return total, sum(p.numel() for p in trained)


def estimate_memory(
    config: Config, plan: BatchPlan, family: str, denoiser: nn.Module, total: int, trained: int
) -> MemoryPlan:
    """Estimate what a step keeps on one device (weights that train and their gradients are float32)."""
    half, full = BYTES[config.train.mixed_precision], config.model.tune == "full"
    needs_copy = full and "reference" in config.build_objective().needs
    activations = None
    if denoiser.config.block_out_channels[0] == NATIVE_WIDTH[family]:
        native, lora, everything, checkpointed = ACTIVATIONS[family]
        image = checkpointed if config.train.gradient_checkpointing else everything if full else lora
        scale = (config.data.resolution / native) ** 2 * (2 if half == 4 else 1)
        activations = image * scale * plan.train_batch_size * _images(config)
    return MemoryPlan(
        weights=(4 * total if full else half * total + 4 * trained) / GIB,
        reference=half * total / GIB if needs_copy else 0.0,
        gradients=4 * trained / GIB,
        optimizer=STATE_BYTES[config.optimizer.name] * trained / GIB,
        activations=activations,
    )


def _images(config: Config) -> int:
    """Return how many images of an example pass with gradient."""
    return online.images_with_gradient(config) if config.is_online else IMAGES[config.build_objective().layout]


def _describe(memory: MemoryPlan) -> str:
    parts = [f"weights {memory.weights:.2f}", f"gradients {memory.gradients:.2f}", f"optimizer {memory.optimizer:.2f}"]
    if memory.reference:
        parts.insert(1, f"reference {memory.reference:.2f}")
    if memory.activations is None:
        return f"about {memory.total:.2f} GiB ({', '.join(parts)}), activations not estimated for this size of model"
    return f"about {memory.total:.1f} GiB ({', '.join(parts)}, activations {memory.activations:.2f})"
