"""Which family a LoRA file belongs to, by the names of its layers, and any file in the layout diffusers loads."""

import difflib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from diffalign.backbones import lora_layouts
from diffalign.backbones.base import TEXT_ENCODERS, Backbone
from diffalign.backbones.families import FAMILIES, family_of, kind_of
from diffalign.backbones.files import LORA_FILE, read_header
from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.lora_files import Lora, LoraFile, check_fits
from diffalign.backbones.lora_keys import Keys
from diffalign.errors import ModelError

UNET_PARTS = ("down", "mid", "up_", "input", "output")  # how the names of its blocks begin
# How kohya's keys begin of transformers.
KOHYA_TRANSFORMERS = ("lora_unet_joint_", "lora_unet_double_", "lora_unet_single_", "lora_unet_transformer_")
KOHYA_TRANSFORMERS += ("lora_unet_layers_", "lora_unet_noise_refiner_", "lora_unet_context_refiner_")


def fitting(file: LoraFile) -> list[type[Backbone]]:
    """Return the families that have all the layers of a LoRA; several share names such as those of attention."""
    found = [kind for kind in FAMILIES if kind.denoiser_name != "unet" and _explains(kind, file)]
    return found or [kind for kind in FAMILIES if kind.denoiser_name == "unet" and _explains(kind, file)]


def guess(file: LoraFile) -> type[Backbone]:
    """Return the family of a LoRA that says nothing but the names of its layers.

    Raises:
        ModelError: no family has them all, or several have.
    """
    found = fitting(file)
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f'The layers in the LoRA "{file.file}" have names that several families share: '
            f"{', '.join(kind.family for kind in found)}. Say which with --family, or the base model with --model."
        )
    kinds = {kind: names for kind in FAMILIES if (names := kind.layer_names()) is not None}
    nearest = min(kinds, key=lambda kind: _distance(file, kinds[kind]))
    file.check_known(kinds[nearest], f"any family, nor of the nearest ({nearest.family})")
    raise AssertionError  # it was among those that fit


def read(file: LoraFile, kind: type[Backbone], names: LayerNames, text: bool = True) -> Lora:
    """Return a LoRA of this family; arguments and errors as of `LoraFile.read`, which also say whose layers it has."""
    if file.unknown(names) and (others := fitting(file)):
        raise ModelError(
            f'The LoRA "{file.file}" is not of {kind.family}: its layers are those of '
            f"{' or '.join(other.family for other in others)}. Give a LoRA of this family, or that model."
        )
    return file.read(names, kind.family, text)


@contextmanager
def in_diffusers_layout(file: Path, denoiser: nn.Module) -> Iterator[Path]:
    """Yield `file`, or what it says in the layout that diffusers loads, where that reads its own falsely or not at all.

    diffusers reads kohya's layout as well, but leaves out what it does not know (the magnitudes of a DoRA, the third
    factor of a LoCon), and of transformers it reads some parts for some families.

    Raises:
        ModelError: the LoRA does not belong on `denoiser`.
    """
    keys, kind = Keys.of(name for name in read_header(file) if name != "__metadata__"), kind_of(denoiser)
    spelled = [(roles.get("down", ""), "alpha" in roles) for roles in keys.layers.values()]
    plain = all(down.endswith(".lora_A.weight") and not alpha for down, alpha in spelled)
    clip = any(place.network in TEXT_ENCODERS for place in keys.layers)  # named in metadata as transformers was then
    loads = keys.layout == "diffusers" and plain and not keys.others and not clip
    names = None if loads or not keys.layers else kind.layer_names(denoiser)
    if names is None:
        yield file
        return
    lora = read(LoraFile(file), kind, names)
    check_fits(lora, denoiser, file, "this model")
    with tempfile.TemporaryDirectory() as folder:
        yield lora_layouts.write(lora, "diffusers", Path(folder) / LORA_FILE, names, kind.denoiser_name)


def names_of(denoiser: nn.Module) -> LayerNames:
    """Return what other programs call the layers of a network.

    Raises:
        ModelError: nobody knows.
    """
    names = kind_of(denoiser).layer_names(denoiser)
    if names is None:
        raise ModelError(
            f"Of a {type(denoiser).__name__} no layout of LoRAs is known but diffusers'. Leave the others out: "
            "diffusers' is written in any case, and its pipelines load that."
        )
    return names


def check_lora(file: Path, pipeline_class: str) -> None:
    """Refuse the LoRA of a UNet for a transformer and the other way round; reads the names of tensors only.

    Raises:
        ModelError: such a LoRA.
    """
    wanted = family_of(pipeline_class, str(file)).denoiser_name
    names = [name for name in read_header(file) if name != "__metadata__"]
    unets = [prefix + part for prefix in ("lora_unet_", "diffusion_model.") for part in UNET_PARTS]
    marks = {
        "unet": ("unet.", *unets),
        "transformer": ("transformer.", "lora_transformer_", "diffusion_model.", *KOHYA_TRANSFORMERS),
    }
    found = [kind for kind, starts in marks.items() if any(name.startswith(starts) for name in names)]
    if found and wanted not in found:
        raise ModelError(
            f'The LoRA "{file}" adapts a {word_for(found[0])}: its tensors are named like "{names[0]}". A '
            f"{pipeline_class} has a {word_for(wanted)}. Give a LoRA of its family, or the base model of this one."
        )


def word_for(name: str) -> str:
    """Return what messages call a denoiser."""
    return {"unet": "UNet"}.get(name, name)


def _distance(file: LoraFile, names: LayerNames) -> tuple[int, float]:
    """Return how many layers are unknown, and how unlike the first of them is to any that is known."""
    unknown = file.unknown(names)
    near = names.nearest(unknown[0].name, unknown[0].flat) or ""
    return len(unknown), -difflib.SequenceMatcher(a=near, b=unknown[0].name).ratio()


def _explains(kind: type[Backbone], file: LoraFile) -> bool:
    names = kind.layer_names()
    return names is not None and not file.unknown(names)
