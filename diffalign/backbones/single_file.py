"""Single-file checkpoints in the original (LDM) layout: recognise the family and load them without a network."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers import AutoencoderKL

from diffalign.backbones.denoiser_file import DenoiserFile
from diffalign.backbones.files import load_errors, quiet_diffusers, read_header
from diffalign.backbones.published import PIPELINE_NAMES, write_config_folder
from diffalign.errors import ModelError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")
VAES = {"sdxl": "madebyollin/sdxl-vae-fp16-fix", "sd15": "stabilityai/sd-vae-ft-mse"}  # what fits most of a family
# What only the text encoders of a whole checkpoint have in their names.
MARKERS = {
    "sdxl": "conditioner.embedders.1.",
    "sd15": "cond_stage_model.transformer.",
    "sd2": "cond_stage_model.model.",
}
# Tensor-name fragments of what a user may offer instead of an SD1.5 or SDXL checkpoint, and what to say.
OTHERS = {
    "lora_": "a LoRA: give its base model here, and the LoRA to evaluation",
    "conditioner.embedders.0.model.": "an SDXL refiner, which cannot be trained here: use the base model",
    "down_blocks.": "a single network in diffusers' layout: put it into a folder with its config.json",
}


def family_of(path: Path) -> str:
    """Return "sd15", "sd2" or "sdxl" from the tensor names of a single-file checkpoint.

    Raises:
        ModelError: the file is broken or is something else.
    """
    names = read_header(path).keys()
    if (family := _whole_family(names)) is not None:
        return family
    found = DenoiserFile.find(path)
    if found is not None and found.kind.denoiser_name != "unet":
        found.check_dtypes()
        raise ModelError(
            f'"{path}" holds a {found.what}, and no whole model that can be read from one file. Give the rest as a '
            f"diffusers folder or hub id: model.pretrained_model_name_or_path={found.pipeline} model.unet_init={path} "
            f"(of commands that draw: --base {found.pipeline} beside this file)."
        )
    for fragment, meaning in OTHERS.items():
        if any(fragment in name for name in names):
            raise ModelError(f'"{path}" is {meaning}.')
    raise ModelError(
        f'"{path}" is no SD1.5, SD2 or SDXL checkpoint with UNet, VAE and text encoders; its tensors are named like '
        f'"{min(names, default="(none)")}". Give a whole checkpoint or a diffusers folder.'
    )


def is_denoiser(path: Path) -> bool:
    """Tell whether a file is a denoiser to be put into a pipeline, and neither a LoRA nor a whole SD1, SD2 or SDXL."""
    if path.suffix != ".safetensors":
        return False
    return _whole_family(read_header(path)) is None and DenoiserFile.find(path) is not None


def check_vae(path: Path) -> None:
    """Refuse a checkpoint without a VAE, as those of UNets with text encoders alone are.

    Raises:
        ModelError: it has none; what to set, then.
    """
    if not any(name.startswith(VAE_PREFIXES) for name in read_header(path)):
        vae = VAES["sdxl" if family_of(path) == "sdxl" else "sd15"]
        raise ModelError(
            f'"{path}" holds no VAE. Set model.pretrained_vae_model_name_or_path, to "{vae}" or the VAE it was made '
            "for. Commands that draw have no such key: give them a whole checkpoint, or a diffusers folder."
        )


@contextmanager
def config_folder(path: Path, config: str | Path | None) -> Iterator[Path]:
    """Yield a diffusers folder with the configurations and tokenizers that fit the checkpoint at `path`.

    `config` is a folder or a hub id; None means the published configurations, which need no network.

    Raises:
        ModelError: the checkpoint is of no supported family, or is an SD2 one and `config` is None.
    """
    family = family_of(path)
    if config is not None:
        if Path(config).is_dir():
            yield Path(config)
            return
        with load_errors("the configurations", str(config)):
            snapshot = huggingface_hub.snapshot_download(str(config), allow_patterns=["*.json", "*.txt"])
        yield Path(snapshot)
        return
    if family not in PIPELINE_NAMES:
        raise ModelError(
            f'"{path}" is an SD2 checkpoint; a single file does not say of which version. Name the diffusers folder '
            'or hub id with its configurations, such as config="stabilityai/stable-diffusion-2-1".'
        )
    with tempfile.TemporaryDirectory() as folder:
        yield write_config_folder(family, Path(folder))


def load_modules(
    path: Path, class_name: str, config: Path, replacements: dict[str, Any], torch_dtype: torch.dtype
) -> dict[str, Any]:
    """Return the pipeline components of the checkpoint at `path`, with `replacements` instead of its own.

    Raises:
        ModelError: the checkpoint does not fit the configurations, or lacks weights.
    """
    is_xl = family_of(path) == "sdxl"
    if is_xl != (class_name == PIPELINE_NAMES["sdxl"]):
        kind = "an SDXL" if is_xl else "an SD1 or SD2"
        raise ModelError(f'"{path}" is {kind} checkpoint, but its config "{config}" is a {class_name}.')
    if "vae" not in replacements:
        check_vae(path)
    with load_errors("the modules", str(path)), quiet_diffusers():
        try:
            pipeline = getattr(diffusers, class_name).from_single_file(
                str(path), config=str(config), torch_dtype=torch_dtype, local_files_only=True, **replacements
            )
        except NotImplementedError as error:  # diffusers moved a tensor that has no value
            raise ModelError(f'"{path}" lacks tensors of its UNet or its VAE. Give a whole checkpoint.') from error
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            _check_complete(module, name, path)
    return dict(pipeline.components)


def load_vae(path: Path, config: str | None, torch_dtype: torch.dtype) -> AutoencoderKL:
    """Load a VAE file in diffusers' or the original layout, shaped like the `vae/config.json` of `config`."""
    read_header(path)
    with load_errors("the VAE", str(path)), quiet_diffusers():
        vae = AutoencoderKL.from_single_file(str(path), config=config, subfolder="vae", torch_dtype=torch_dtype)
    _check_complete(vae, "vae", path)
    return vae


def _whole_family(names: Collection[str]) -> str | None:
    has_unet = any(name.startswith(UNET_PREFIX) for name in names)
    found = (family for family, marker in MARKERS.items() if any(name.startswith(marker) for name in names))
    return next(found, None) if has_unet else None


def _check_complete(module: torch.nn.Module, name: str, path: Path) -> None:
    # diffusers leaves what the file lacks on the meta device, to fail much later.
    missing = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        raise ModelError(
            f'"{path}" lacks {len(missing)} tensors of the {name}, such as "{missing[0]}". Give a whole checkpoint '
            "that fits its configurations."
        )
