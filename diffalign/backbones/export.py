"""Write trained weights in the layouts other programs load, and put such weights into a pipeline for evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.backbones import inspection, lora_layouts, peft_folders, single_file
from diffalign.backbones.adapters import ADAPTER, adapted_layers, has_adapters
from diffalign.backbones.families import denoiser_name, denoiser_of, family_of, name_of, with_denoiser
from diffalign.backbones.files import LORA_FILE, read_header, write_atomically
from diffalign.backbones.kohya import kohya_metadata
from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.loading import denoiser_marks, load, load_denoiser, with_marks
from diffalign.backbones.lora_factors import Factors
from diffalign.backbones.lora_families import names_of, word_for
from diffalign.backbones.lora_files import Lora, find_file
from diffalign.backbones.lora_loading import load_lora, load_readable
from diffalign.errors import ModelError

# Settings in which the denoisers of two families, or of two sizes of one, differ.
SHAPES = ("cross_attention_dim", "addition_embed_type", "in_channels", "joint_attention_dim")
SHAPES += ("num_layers", "num_single_layers", "dim", "n_layers", "use_additional_conditions")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def save_lora(
    denoiser: nn.Module,
    directory: str | Path,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(directory)` loads, alpha included.

    Args:
        denoiser: the unwrapped network with the adapters of `add_lora`.
        directory: folder to write to; made if missing.
        base_model: what the adapters belong on, for the file's metadata.
        metadata: further entries of the file's metadata; values become strings.
        state_dict: the network's full state dict, where its own is sharded or an average is wanted.
        dtype: of the file; the tensors' own (float32) when None.

    Raises:
        ModelError: there are no adapters, or the file cannot be written (a previous one is intact).
    """
    lora, _ = _adapter(denoiser, state_dict, dtype)
    header = lora_header(denoiser, base_model, metadata)
    tensors = {f"{name_of(denoiser)}.{key}": tensor for key, tensor in lora.items()}
    return write_atomically(Path(directory) / LORA_FILE, lambda path: save_file(tensors, path, metadata=header))


def lora_header(
    denoiser: nn.Module, base_model: str | None = None, metadata: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return the metadata of the file that `save_lora` writes."""
    config = denoiser.peft_config[ADAPTER]
    # Only what decides the result, so that other versions of peft accept it.
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "lora_dropout": config.lora_dropout,
    }
    if config.exclude_modules:  # peft warns of targets that the file lacks, and of exclusions too, so name each layer
        settings["target_modules"] = sorted(adapted_layers(denoiser, ADAPTER))
    header = _strings(base_model, metadata)
    name = name_of(denoiser)
    header[LORA_ADAPTER_METADATA_KEY] = json.dumps({f"{name}.{key}": value for key, value in settings.items()})
    return header


def lora_keys(denoiser: nn.Module) -> dict[str, str]:
    """Return how the file that `save_lora` writes calls the adapters' parameters, by their names in the network."""
    parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    named = get_peft_model_state_dict(denoiser, state_dict=parameters, adapter_name=ADAPTER)
    keys = {id(parameter): key for key, parameter in named.items()}  # peft names what it is given, and copies nothing
    return {name: f"{name_of(denoiser)}.{keys[id(parameter)]}" for name, parameter in parameters.items()}


def save_kohya_lora(
    denoiser: nn.Module,
    file: str | Path,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    prediction_type: str = "epsilon",
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapters as one `lora_unet_*` file, the layout of ComfyUI, A1111 and kohya's sd-scripts.

    Arguments and errors as in `save_lora`; `file` names the file itself and `prediction_type` goes to its metadata.
    """
    lora, names = lora_of(denoiser, base_model, metadata, state_dict), names_of(denoiser)
    config = denoiser.peft_config[ADAPTER]
    if name_of(denoiser) == "unet":
        said = kohya_metadata(denoiser, config.r, config.lora_alpha, prediction_type, Path(file).stem)
        lora.metadata = said | lora.metadata
    if base_model is not None:
        lora.metadata["ss_sd_model_name"] = base_model
    return _write_file(lora, "kohya", file, names, denoiser, dtype)


def save_comfy_lora(
    denoiser: nn.Module,
    file: str | Path,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapters as one `diffusion_model.*` file, the layout of ComfyUI for transformers.

    Arguments and errors as in `save_lora`; `file` names the file itself.
    """
    lora = lora_of(denoiser, base_model, metadata, state_dict)
    return _write_file(lora, "comfy", file, names_of(denoiser), denoiser, dtype)


def lora_of(
    denoiser: nn.Module,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> Lora:
    """Return the adapters by layer; arguments and errors as in `save_lora`."""
    tensors, config = _adapter(denoiser, state_dict, None)
    names = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in tensors)
    layers = {
        name: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], float(config.lora_alpha))
        for name in names
    }
    return Lora(layers, metadata=_strings(base_model, metadata))


def require_kohya(denoiser: nn.Module) -> None:
    """Raise ModelError for networks whose LoRAs have no layout but diffusers' here."""
    names_of(denoiser)


def save_denoiser(
    denoiser: nn.Module,
    directory: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `directory/unet/` or `transformer/`, config.json and safetensors, which diffusers' `from_pretrained` loads.

    Arguments and errors as in `save_lora`. The new folder takes the old one's place only once it is complete.
    """
    if has_adapters(denoiser):
        raise ModelError("This network has LoRA adapters: export them with save_lora.")
    tensors = {key: _for_file(tensor, dtype) for key, tensor in (state_dict or denoiser.state_dict()).items()}

    def write(folder: Path) -> None:
        folder.mkdir()
        denoiser.save_config(folder)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    return write_atomically(Path(directory) / name_of(denoiser), write)


def load_adapter_into(pipeline: Any, source: str | Path) -> Any:
    """Return a pipeline with the weights at `source`: `pipeline` itself, or a new one if `source` is a whole pipeline.

    source: a LoRA file or folder of any layout, or one with a folder of peft's for each network; a file or folder of a
    UNet or transformer, a folder that holds `unet/` or `transformer/`, a pipeline folder, or a hub id of a LoRA, a UNet
    or a transformer.

    Raises:
        ModelError: nothing of the kind is there, or it does not fit this pipeline.
    """
    path = Path(source)
    if path.is_file() and single_file.is_denoiser(path):
        return _replace_denoiser(pipeline, source)
    if path.is_file() or _holds_lora(path):
        return load_lora(pipeline, _lora_file(path), str(source))
    if peft_folders.parts(path):
        with peft_folders.joined(path) as file:
            return load_lora(pipeline, file, str(source))
    if (path / "model_index.json").is_file():
        backbone = load(path, torch_dtype=denoiser_of(pipeline).dtype).to(pipeline.device)
        return backbone.pipeline()
    if path.is_dir():
        return _replace_denoiser(pipeline, source)
    try:
        return _replace_denoiser(pipeline, source)
    except ModelError as error:
        try:
            return load_readable(pipeline, str(source), LORA_FILE, str(source))
        except ModelError:
            raise error from None


def unload_adapters(pipeline: Any) -> None:
    """Take the LoRAs out of a pipeline, so that it is as it was before."""
    if hasattr(pipeline, "unload_lora_weights"):
        pipeline.unload_lora_weights()
    elif has_adapters(denoiser := denoiser_of(pipeline)):
        denoiser.unload_lora()


def _adapter(denoiser: nn.Module, state_dict: dict[str, Tensor] | None, dtype: torch.dtype | None) -> tuple[dict, Any]:
    if not has_adapters(denoiser):
        raise ModelError("This network has no LoRA adapters: export it with save_denoiser.")
    lora = get_peft_model_state_dict(denoiser, state_dict=state_dict, adapter_name=ADAPTER)
    return {key: _for_file(tensor, dtype) for key, tensor in lora.items()}, denoiser.peft_config[ADAPTER]


def _write_file(
    lora: Lora, layout: str, file: str | Path, names: LayerNames, denoiser: nn.Module, dtype: torch.dtype | None
) -> Path:
    if Path(file).suffix != ".safetensors":
        raise ModelError(f'A {layout} LoRA is one .safetensors file, got "{file}".')
    return lora_layouts.write(lora, layout, Path(file), names, name_of(denoiser), dtype)


def _for_file(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _strings(base_model: str | None, metadata: Mapping[str, Any] | None) -> dict[str, str]:
    entries = {"format": "pt"} | ({} if base_model is None else {"base_model": base_model})
    return entries | {key: str(value) for key, value in (metadata or {}).items()}


def _lora_file(path: Path) -> Path:
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(f'"{path}" is not a .safetensors file. Give a LoRA file, a LoRA folder or a UNet folder.')
    return find_file(path)


def _holds_lora(folder: Path) -> bool:
    """Tell whether a file of a folder is a LoRA; its networks' files are called otherwise."""
    files = [file for file in folder.glob("*.safetensors") if file.name != WEIGHTS_FILE]
    return any("lora" in name for file in files for name in read_header(file))


def _replace_denoiser(pipeline: Any, source: str | Path) -> Any:
    own, name = denoiser_of(pipeline), word_for(denoiser_name(pipeline))
    family = family_of(type(pipeline).__name__, str(source))
    if (file := inspection.denoiser_file(source)) is not None:
        network = file.load(family, own.config, "this pipeline", own.dtype)
    else:
        network = load_denoiser(source, family, own.dtype)
    for key in SHAPES:
        if network.config.get(key) != own.config.get(key):
            raise ModelError(
                f'The {name} of "{source}" has {key} {network.config.get(key)}, this pipeline {own.config.get(key)}: '
                f"they belong to different families. Give the base model this {name} was trained from."
            )
    if name == "UNet":
        pipeline.scheduler = with_marks(pipeline.scheduler, denoiser_marks(Path(source)))
    return with_denoiser(pipeline, network.to(pipeline.device))
