"""Folders that peft writes, one for each network of a pipeline (unet/, text_encoder/ ...), as one LoRA file."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffalign.backbones.base import TEXT_ENCODERS
from diffalign.backbones.families import DENOISERS
from diffalign.backbones.files import LORA_FILE, read_header
from diffalign.backbones.lora_files import PEFT_CONFIG
from diffalign.errors import ModelError

PEFT_WEIGHTS = "adapter_model.safetensors"
WRAPPER = "base_model.model."  # what peft calls the network that it adapts
SAID = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")  # what decides the result


def parts(folder: Path) -> dict[str, Path]:
    """Return the folders of adapters in `folder` by the pipeline's names of their networks, a denoiser among them."""
    found = {name: folder / name for name in (*DENOISERS, *TEXT_ENCODERS) if (folder / name / PEFT_CONFIG).is_file()}
    return found if found.keys() & set(DENOISERS) else {}


def base_named(place: Path) -> str | None:
    """Return the base model that peft's configuration at, beside or below `place` names, if one does."""
    folder = place if place.is_dir() else place.parent
    for config in (folder / PEFT_CONFIG, *(part / PEFT_CONFIG for part in parts(folder).values())):
        if config.is_file() and (name := _read(config).get("base_model_name_or_path")):
            return str(name)
    return None


@contextmanager
def joined(folder: Path) -> Iterator[Path]:
    """Yield one file in diffusers' names with the LoRA of all networks in `folder`.

    Raises:
        ModelError: weights are missing or damaged.
    """
    tensors, said = {}, {}
    for network, place in parts(folder).items():
        file = place / PEFT_WEIGHTS
        if not file.is_file():
            raise ModelError(f'"{place}" has peft\'s {PEFT_CONFIG} but no {PEFT_WEIGHTS}. Export the adapter again.')
        read_header(file)
        try:
            held = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f'Cannot read "{file}" ({error}). Download or export it again.') from error
        tensors |= {f"{network}.{key.removeprefix(WRAPPER)}": tensor for key, tensor in held.items()}
        said |= {f"{network}.{key}": value for key, value in _read(place / PEFT_CONFIG).items() if key in SAID}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / LORA_FILE
        save_file(tensors, file, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(said)})
        yield file


def _read(config: Path) -> dict[str, Any]:
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f'"{config}" is no JSON ({error}). Export the adapter again.') from error
