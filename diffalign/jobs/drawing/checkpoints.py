"""Put weights into a base model's pipeline, those of a run at one of its checkpoints too."""

import copy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign import config as configuration
from diffalign.backbones import adapters
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.families import denoiser_of, family_of, with_denoiser
from diffalign.backbones.files import load_errors, quiet_diffusers
from diffalign.config.sections import LoraSettings
from diffalign.errors import ModelError
from diffalign.training.checkpoint import STATE, WEIGHTS


def is_checkpoint(folder: str | Path) -> bool:
    """Tell whether `folder` is the checkpoint of a run."""
    return all((Path(folder) / name).is_file() for name in (STATE, WEIGHTS))


def load_weights(pipeline: DiffusionPipeline, weights: str) -> DiffusionPipeline:
    """Return `pipeline`, a base, with the LoRA, the denoiser or the checkpoint of a run that `weights` names."""
    if is_checkpoint(weights):
        return load_into(pipeline, Path(weights))
    return load_adapter_into(pipeline, weights)


def load_into(pipeline: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """Return `pipeline`, the run's base, with the weights that the run had at this checkpoint (not their average).

    A LoRA is put beside the adapters that the denoiser has; all weights of a denoiser come without them.

    Raises:
        ModelError: the checkpoint is damaged or its run trained something else.
    """
    config = configuration.load(folder.parent / "config.yaml")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} is damaged ({error}). Use another checkpoint.") from error
    denoiser = denoiser_of(pipeline)
    if config.model.tune == "lora":
        lora = config.lora
        if adapters.has_adapters(denoiser):
            return _load_beside(pipeline, folder, tensors, lora)
        family = family_of(type(pipeline).__name__, str(folder))
        targets, idle = lora.lora_target_modules or family.lora_targets, family.idle_layers(denoiser)
        adapters.add_lora(denoiser, lora.rank, lora.lora_alpha, targets, blocks=lora.blocks, idle=idle)
    else:
        denoiser = copy.deepcopy(denoiser)
        if adapters.has_adapters(denoiser):
            denoiser.unload_lora()
        with_denoiser(pipeline, denoiser.requires_grad_(True))
    parameters = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    if parameters.keys() != tensors.keys() or any(tensors[name].shape != p.shape for name, p in parameters.items()):
        raise ModelError(f"{folder} does not fit {folder.parent / 'config.yaml'}: it holds other weights.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    denoiser.requires_grad_(False)
    return pipeline


def _load_beside(
    pipeline: DiffusionPipeline, folder: Path, tensors: dict[str, Tensor], lora: LoraSettings
) -> DiffusionPipeline:
    settings = {"r": lora.rank, "lora_alpha": lora.lora_alpha or lora.rank, "lora_dropout": 0.0}
    denoiser, family = denoiser_of(pipeline), family_of(type(pipeline).__name__, str(folder))
    settings["target_modules"] = sorted(lora.lora_target_modules or family.lora_targets)
    adapter = adapters.free_name(denoiser)
    named = {name.replace(f".{adapters.ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    with load_errors("the LoRA", str(folder)), quiet_diffusers():
        denoiser.load_lora_adapter(named, prefix=None, adapter_name=adapter, metadata=settings)
    fitting = adapters.count_adapted(denoiser, adapter)
    if 2 * fitting != len(tensors):
        raise ModelError(f"Only {fitting} of the {len(tensors) // 2} modules in the LoRA of {folder} fit this model.")
    return pipeline
