"""`diffalign train --dry-run`: what a run would do, without loading weights or data."""

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
from diffalign.denoising import INVERSIONS, STABLE_DIFFUSION, DDPMPath, inversion
from diffalign.errors import ModelError
from diffalign.jobs.training import assemble, memory, online_costs
from diffalign.objectives.base import UNITS
from diffalign.training import optimizer
from diffalign.training.batching import BatchPlan


def show(config: Config, console: Console) -> None:
    """Print the resolved configuration, the batch arithmetic, the learning rate, parameters and memory."""
    console.print(Syntax(configuration.dump(config), "yaml", background_color="default"))
    world_size = max(torch.cuda.device_count(), 1)
    plan = BatchPlan.of(config.train, world_size)
    rate = optimizer.peak_learning_rate(config.optimizer, plan.global_batch_size)
    denoiser, family, source = skeleton(config)
    total, trained = _parameters(config, denoiser)
    counts = memory.Counts(family, denoiser, total, trained)
    checkpointing = memory.checkpointing(config, plan, counts)
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
        "memory": memory.describe(memory.estimate(config, plan, counts, checkpointing.kind)),
        "checkpointing": checkpointing.why,
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


def passes(config: Config) -> str:
    """Word how many images pass through the network for one example, the cost of a method."""
    objective = config.build_objective()
    if config.is_online:
        return online_costs.passes(config)
    images, mismatched = memory.IMAGES[objective.layout], 2 if "mismatched" in objective.needs else 0
    frozen = float(images * (("reference" in objective.needs) + mismatched))
    note = f" (lists counted as {images} images)" if objective.layout == "list" else ""
    if config.reference.cache_draws is not None:
        note += f", once the reference's {images} of each of {config.reference.cache_draws} draws are kept"
        frozen -= images
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
    trained = adapters.add_lora(denoiser, lora.rank, lora.lora_alpha, lora.lora_target_modules, blocks=lora.blocks)
    return total, sum(p.numel() for p in trained)
