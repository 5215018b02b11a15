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
from diffalign.backbones.families import denoiser_of, kind_of, with_denoiser
from diffalign.backbones.files import LORA_FILE, load_errors, quiet_diffusers
from diffalign.config.sections import LoraSettings
from diffalign.errors import ModelError
from diffalign.training.checkpoint import STATE, WEIGHTS


def is_checkpoint(folder: str | Path) -> bool:
    """Tell whether `folder` is the checkpoint of a run."""
    folder = Path(folder)
    return (folder / STATE).is_file() and any((folder / name).is_file() for name in (LORA_FILE, WEIGHTS))


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
    if (folder / LORA_FILE).is_file():
        return load_adapter_into(pipeline, folder)
    config = configuration.load(folder.parent / "config.yaml")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} is damaged ({error}). Use another checkpoint.") from error
    if config.model.tune == "lora":  # written before 2026-12
        return _load_named(pipeline, folder, tensors, config.lora)
    denoiser = copy.deepcopy(denoiser_of(pipeline))
    if adapters.has_adapters(denoiser):
        denoiser.unload_lora()
    with_denoiser(pipeline, denoiser)
    parameters = dict(denoiser.named_parameters())
    if parameters.keys() != tensors.keys() or any(tensors[name].shape != p.shape for name, p in parameters.items()):
        raise ModelError(f"{folder} does not fit {folder.parent / 'config.yaml'}: it holds other weights.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    denoiser.requires_grad_(False)
    return pipeline


def _load_named(
    pipeline: DiffusionPipeline, folder: Path, tensors: dict[str, Tensor], lora: LoraSettings
) -> DiffusionPipeline:
    settings = {"r": lora.rank, "lora_alpha": lora.lora_alpha or lora.rank, "lora_dropout": 0.0}
    denoiser = denoiser_of(pipeline)
    settings["target_modules"] = sorted(lora.lora_target_modules or kind_of(denoiser).lora_targets)
    adapter = adapters.free_name(denoiser)
    named = {name.replace(f".{adapters.ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    with load_errors("the LoRA", str(folder)), quiet_diffusers():
        adapters.adaptable(denoiser).load_lora_adapter(named, prefix=None, adapter_name=adapter, metadata=settings)
    fitting = adapters.count_adapted(denoiser, adapter)
    if 2 * fitting != len(tensors):
        raise ModelError(f"Only {fitting} of the {len(tensors) // 2} modules in the LoRA of {folder} fit this model.")
    return pipeline
