"""`diffalign convert`: a LoRA file, whoever made it, in the layout that another program loads."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from diffalign.backbones import inspection, lora_families, lora_files, lora_layouts, published
from diffalign.backbones.base import Backbone
from diffalign.backbones.families import BY_NAME
from diffalign.backbones.files import LORA_FILE
from diffalign.backbones.kohya import kohya_metadata
from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.lora_files import Lora, LoraFile
from diffalign.errors import ConfigError, ModelError, suggestion
from diffalign.jobs.devices import pick_dtype
from diffalign.jobs.training import meta_model

KEEP = "keep"  # the dtype of the source


@dataclass(frozen=True)
class Target:
    """Say which network a LoRA belongs on."""

    kind: type[Backbone]
    denoiser: nn.Module | None = None  # on the meta device, where its shapes are known
    model: str = ""

    @cached_property
    def names(self) -> LayerNames:
        """Return the names of its layers.

        Raises:
            ModelError: only diffusers' layout is known of the family.
        """
        names = self.kind.layer_names(self.unet or self.denoiser)
        if names is None:
            raise ModelError(f"Of {self.kind.family} no layout of LoRAs is known but diffusers'.")
        return names

    @cached_property
    def unet(self) -> nn.Module | None:
        """Return the UNet whose layers are named: the published one where no other is known; None of transformers."""
        if self.kind.denoiser_name != "unet":
            return None
        return self.denoiser or published.random_unet(self.kind.family, device="meta")


def run(
    source: Path,
    out: Path,
    to: str,
    console: Console,
    *,
    family: str | None = None,
    model: str | None = None,
    dtype: str = KEEP,
    text: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the LoRA at `source` in the layout `to` and return the file.

    Args:
        source: a LoRA file, or a folder with one.
        out: a .safetensors file, or a folder.
        to: one of `lora_layouts.LAYOUTS`.
        family: of the model it belongs on; found by its metadata or its layers when None.
        model: that model, instead of its family: every layer's shape is checked too.
        dtype: of the factors: "keep", "float32", "float16" or "bfloat16".
        text: carry what it holds of CLIP text encoders; otherwise leave that out, and say so.
        overwrite: replace `out` if it exists.

    Raises:
        ConfigError: an unknown layout or family, or `out` exists.
        ModelError: the file is no LoRA, of another family, or has layers nobody knows.
    """
    if to not in lora_layouts.LAYOUTS:
        available = ", ".join(lora_layouts.LAYOUTS)
        raise ConfigError(f'Unknown --to "{to}".{suggestion(to, lora_layouts.LAYOUTS)} Available: {available}.')
    stored = None if dtype == KEEP else pick_dtype(dtype, torch.device("cpu"))
    file = LoraFile(lora_files.find_file(source.expanduser()))
    written = _out_file(out.expanduser(), file.file, to)
    if written.exists() and (not overwrite or written.samefile(file.file)):
        fix = "Choose another OUT" if written.samefile(file.file) else "Choose another OUT, or replace it: --overwrite"
        raise ConfigError(f'"{written}" exists{" and is the source" if overwrite else ""}. {fix}.')
    target = _target(file, family, model)
    lora = lora_families.read(file, target.kind, target.names, text)
    if target.denoiser is not None:
        lora_files.check_fits(lora, target.denoiser, file.file, f'"{target.model}"')
    if target.unet is not None and to != "diffusers":
        lora.metadata = _said_of_unet(target.unet, lora, written.stem) | lora.metadata
    lora_layouts.write(lora, to, written, target.names, target.kind.denoiser_name, stored)
    _report(console, file, lora, target, written)
    return written


def _out_file(out: Path, source: Path, to: str) -> Path:
    if out.suffix == ".safetensors":
        return out
    if out.is_file():
        raise ConfigError(f'OUT "{out}" is a file, and none of .safetensors. Give such a name, or a folder.')
    return out / (LORA_FILE if to == "diffusers" else f"{_title(source)}.safetensors")


def _title(source: Path) -> str:
    """Return a name for the LoRA: that of its folder where the file has the one all have."""
    return source.resolve().parent.name if source.name in (LORA_FILE, "adapter_model.safetensors") else source.stem


def _target(file: LoraFile, family: str | None, model: str | None) -> Target:
    if family is not None and model is not None:
        raise ConfigError("Give --family or --model, not both: the model says its family.")
    if family is not None:
        if family not in BY_NAME:
            raise ConfigError(
                f'Unknown --family "{family}".{suggestion(family, BY_NAME)} Available: {", ".join(BY_NAME)}.'
            )
        return Target(BY_NAME[family])
    if model is not None:
        found = meta_model.at(model)
        return Target(found.kind, found.denoiser if found.is_read else None, model)
    return _said(file) or Target(lora_families.guess(file))


def _said(file: LoraFile) -> Target | None:
    """Return what the file's metadata say of its base model, if they do and it is known."""
    base = file.metadata.get("base_model")
    if base is None:
        return None
    if (named := inspection.transformer_family(base)) is not None:
        return Target(named)
    if base in published.MODELS:
        return Target(BY_NAME[published.MODELS[base]])
    try:
        return Target(inspection.family_at(base)) if Path(inspection.located(base)).is_dir() else None
    except ModelError:  # moved since, or never on this machine
        return None


def _said_of_unet(unet: nn.Module, lora: Lora, title: str) -> dict[str, str]:
    """Return by which metadata user interfaces tell what a LoRA of a UNet is for."""
    said = kohya_metadata(unet, 0, 0, lora.metadata.get("prediction_type", "epsilon"), title)
    return {key: value for key, value in said.items() if key not in ("ss_network_dim", "ss_network_alpha")}


def _report(console: Console, file: LoraFile, lora: Lora, target: Target, written: Path) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    ranks = sorted({factors.rank for factors in lora.layers.values()})
    scales = sorted({round(factors.scale, 6) for factors in lora.layers.values()})
    say(
        f"{file.file}: {file.layout}, {target.kind.family}, {len(lora.layers)} layers, rank {_range(ranks)}, "
        f"alpha/rank {_range(scales)}"
    )
    for encoder, layers in lora.text.items():
        say(f"  {encoder}: {len(layers)} layers")
    for note in lora.notes:
        say(f"  {note}")
    say(f"{written}")


def _range(values: list) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
