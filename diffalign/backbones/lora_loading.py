"""Put a LoRA of any layout into a pipeline: the parts of its denoiser and text encoders, all of it or an error."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from diffalign.backbones import marks
from diffalign.backbones.adapters import adaptable, count_adapted, free_name
from diffalign.backbones.base import TEXT_ENCODERS
from diffalign.backbones.families import denoiser_name, denoiser_of, name_of
from diffalign.backbones.files import load_errors, quiet_diffusers, read_header
from diffalign.backbones.lora_families import check_lora, in_diffusers_layout, word_for
from diffalign.backbones.lora_keys import Keys
from diffalign.errors import ModelError


def load_lora(pipeline: Any, file: Path, source: str) -> Any:
    """Return `pipeline` with the LoRA in `file`; `source` is what messages call it.

    Raises:
        ModelError: it does not fit this pipeline, or not all of it.
    """
    check_lora(file, type(pipeline).__name__)
    _tell_other_schedule(pipeline, file, source)
    with in_diffusers_layout(file, denoiser_of(pipeline)) as readable:
        return load_readable(pipeline, readable.parent, readable.name, source)


def load_readable(pipeline: Any, folder: Path | str, name: str, source: str) -> Any:
    """Return `pipeline` with the LoRA `name` in a folder, or on the hub, in the layout of diffusers."""
    denoiser = denoiser_of(pipeline)
    expected = _count_modules(folder / name, source) if isinstance(folder, Path) else None
    adapter = free_name(denoiser)
    # For each text encoder a UNet-only LoRA draws a warning that ends in "open an issue".
    with load_errors("the LoRA", source), quiet_diffusers():
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(str(folder), weight_name=name, adapter_name=adapter, use_safetensors=True)
        else:  # PixArt's have no loader
            options = {"weight_name": name, "adapter_name": adapter, "use_safetensors": True}
            adaptable(denoiser).load_lora_adapter(str(folder), prefix=name_of(denoiser), **options)
    _check_all_there(pipeline, adapter, expected, source)
    return pipeline


def _check_all_there(pipeline: Any, adapter: str, expected: Counter[str] | None, source: str) -> None:
    """Refuse a LoRA of which something was left out: diffusers only logs what did not fit."""
    name = denoiser_name(pipeline)
    fitting = count_adapted(denoiser_of(pipeline), adapter)
    if fitting == 0 or (expected is not None and fitting != expected["denoiser"]):
        raise ModelError(
            f'Only {fitting} of the {expected["denoiser"] if expected else "adapted"} modules in the LoRA "{source}" '
            f"fit this {word_for(name)}. Check that it was trained on this model family."
        )
    for encoder in TEXT_ENCODERS if expected else ():
        network = getattr(pipeline, encoder, None)
        found = 0 if network is None else count_adapted(network, adapter)
        if found != expected[encoder]:
            raise ModelError(
                f'Only {found} of the {expected[encoder]} modules for {encoder} in the LoRA "{source}" fit this '
                f"{type(pipeline).__name__}. Check that it was trained on this model family."
            )


def _count_modules(file: Path, source: str) -> Counter[str]:
    """Return how many layers of each network a file adapts."""
    layers = Keys.of(name for name in read_header(file) if name != "__metadata__").layers
    count = Counter(place.network for place, roles in layers.items() if "down" in roles)
    if count["denoiser"] == 0:
        raise ModelError(f'"{source}" has no LoRA tensors for a denoiser. Give a LoRA of one, or a folder with unet/.')
    return count


def _tell_other_schedule(pipeline: Any, file: Path, source: str) -> None:
    """Warn of a LoRA that was trained on a model which predicts something else."""
    if denoiser_name(pipeline) != "unet":
        return
    said = marks.schedule_hints(file).get("prediction_type")
    own = pipeline.scheduler.config.get("prediction_type", marks.EPSILON)
    if said is not None and said != own:
        warnings.warn(
            f'The LoRA "{source}" says that it was trained on a model that predicts {said}; this one predicts {own}. '
            "Give the model that it belongs on, or one whose prediction_type is right.",
            stacklevel=2,
        )
