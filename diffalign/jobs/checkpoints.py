"""Draw with a run as it was at one of its checkpoints."""

import copy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffalign import config as configuration
from diffalign.backbones import adapters
from diffalign.errors import ModelError
from diffalign.training.checkpoint import STATE, WEIGHTS


def is_checkpoint(folder: str | Path) -> bool:
    """Tell whether `folder` is the checkpoint of a run."""
    return all((Path(folder) / name).is_file() for name in (STATE, WEIGHTS))


def load_into(pipeline: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """Return `pipeline`, the run's base, with the weights that the run had at this checkpoint (not their average).

    Raises:
        ModelError: the checkpoint is damaged or its run trained something else.
    """
    config = configuration.load(folder.parent / "config.yaml")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} is damaged ({error}). Use another checkpoint.") from error
    if config.model.tune == "lora":
        lora = config.lora
        adapters.add_lora(pipeline.unet, lora.rank, lora.lora_alpha, lora.lora_target_modules)
    else:
        pipeline.register_modules(unet=copy.deepcopy(pipeline.unet).requires_grad_(True))
    parameters = {name: value for name, value in pipeline.unet.named_parameters() if value.requires_grad}
    if parameters.keys() != tensors.keys() or any(tensors[name].shape != p.shape for name, p in parameters.items()):
        raise ModelError(f"{folder} does not fit {folder.parent / 'config.yaml'}: it holds other weights.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    pipeline.unet.requires_grad_(False)
    return pipeline
