"""The model of a run without its weights: its shapes, for estimates of memory and disk. Nothing is downloaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer

from diffalign.backbones import inspection, published
from diffalign.backbones.adapters import trainable_parameters
from diffalign.backbones.base import TEXT_ENCODERS, TOKENIZERS, Backbone
from diffalign.backbones.families import BY_NAME
from diffalign.config import Config
from diffalign.denoising import Shift, TimestepSampling
from diffalign.errors import ModelError
from diffalign.jobs.training import assemble, memory, networks
from diffalign.places import local


@dataclass(frozen=True)
class MetaModel:
    """Hold what is known of a model before it is loaded."""

    denoiser: nn.Module  # on the meta device
    family: str
    origin: str  # in words, where the shapes are from
    vae_scale_factor: int = 8
    scheduler: Mapping[str, Any] | None = None  # its configuration, where it is here
    is_read: bool = False  # the shapes are the model's own, and not those of the published one
    folder: Path | None = None  # of the pipeline, where it is here

    @property
    def kind(self) -> type[Backbone]:
        """Return the family's class."""
        return BY_NAME[self.family]

    def shift_at(self, resolution: int) -> Shift | None:
        """Return how the scheduler moves levels of noise for pictures of this size, None if it is not here."""
        side = resolution // (self.vae_scale_factor * self.kind.patch_size(self.denoiser.config))
        return None if self.scheduler is None else self.kind.shift(self.scheduler, side**2)

    def prompt_size(self) -> int:
        """Return how many numbers a prompt is encoded as, for tokenizers of the published lengths."""
        numbers, index = self.kind.prompt_size(self.denoiser.config), None
        if self.folder is not None and (file := self.folder / "model_index.json").is_file():
            index = json.loads(file.read_text(encoding="utf8"))
        if index is None:
            return numbers
        present = {name for name, part in index.items() if isinstance(part, list) and part[0] is not None}
        return numbers - self.kind.absent_text(self.denoiser.config, present)

    def tokenizers(self) -> list[Any]:
        """Load the tokenizers, [] where they are not here."""
        folders = [] if self.folder is None else [self.folder / name for name in TOKENIZERS]
        try:
            if not folders and self.kind.denoiser_name == "unet":  # a single file, or not here yet
                return [published.clip_tokenizer("<|endoftext|>")]
            return [AutoTokenizer.from_pretrained(folder) for folder in folders if folder.is_dir()]
        except (OSError, ValueError, ModelError):  # a hub cache may hold parts of a folder
            return []


def read(config: Config) -> MetaModel:
    """Return the model of a run.

    A hub model that is not in the local cache counts as the published model it is named like; a single file does so by
    the names of its tensors. A denoiser in a file is counted in its header.

    Raises:
        ModelError: a path that does not exist, or a folder that is no pipeline of a supported family.
    """
    model, place = at(config.model.pretrained_model_name_or_path, config.model.revision), config.model.unet_init
    # What is not there is refused elsewhere; the shapes of the base are known all the same.
    file = inspection.denoiser_file(place) if place is not None and local(place).is_file() else None
    if file is None:
        return model
    if not model.is_read and file.kind.denoiser_name != "unet":
        model = replace(model, denoiser=published.random_transformer(file.pipeline, device="meta"))
    return replace(model, origin=f"{file.parameters:,} in {file.dtype} by the header of {file.path.name}")


def at(source: str, revision: str | None = None) -> MetaModel:
    """Return the model that `source` names; as `read`."""
    name = inspection.located(source)
    if Path(name).is_dir():
        return _from_folder(Path(name), inspection.family_at(name), "from its config")
    if Path(name).is_file():
        family = inspection.family_at(name).family
        return MetaModel(published.random_unet(family, device="meta"), family, f"counted as the published {family}")
    cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
    if isinstance(cached, str):
        folder = Path(cached).parent
        family = inspection.family_at(folder)
        if (folder / family.denoiser_name / "config.json").is_file():
            return _from_folder(folder, family, "from its config in the hub cache")
    if (kind := inspection.transformer_family(name)) is not None:
        models = published.TRANSFORMERS[kind.family]
        known = name if name in models else next(iter(models))
        network = published.random_transformer(known, device="meta")
        origin = f"not read; counted as the published {known}"
        scale, scheduler = published.VAE_SCALES.get(kind.family, 8), published.SHIFTS.get(kind.family, {})
        return MetaModel(network, kind.family, origin, scale, scheduler)
    family = published.MODELS.get(name) or ("sdxl" if "xl" in name.lower() else "sd15")
    origin = f"not read; counted as the published {family}"
    return MetaModel(published.random_unet(family, device="meta"), family, origin)


def timesteps(config: Config, model: MetaModel) -> str | None:
    """Word how timesteps are drawn, None if it is as ever: all of DDPM's alike."""
    if config.is_online:
        return None
    shift = model.shift_at(config.data.resolution)
    sampling = assemble.timestep_sampling(config, shift or Shift())
    if sampling == TimestepSampling() and model.kind.ddim_steps:
        return None
    known = shift is not None or config.denoising.timestep_shift is not None
    return str(sampling) if known else f"{sampling.density}, shifted as the scheduler of the model says"


def count(config: Config, denoiser: nn.Module) -> tuple[int, int]:
    """Return how many parameters the denoiser has and how many of them, or of adapters added here, are trained."""
    total = sum(p.numel() for p in denoiser.parameters())
    if config.model.tune == "full":
        return total, total
    networks.add_adapters(config, denoiser)
    return total, sum(p.numel() for p in trainable_parameters(denoiser))


def encoder_bytes(config: Config, model: MetaModel) -> float:
    """Return how large the VAE, in float32, and the text encoders of a run are, in the precision they are loaded in.

    Of families whose published encoders are not counted, it is what is here of them.
    """
    parts = _encoders_at(model.folder, model.kind) if model.folder else {}
    if "vae" not in parts:  # some of it is not here
        known = published.PARAMETERS.get(model.family) or published.FLOW_ENCODERS.get(model.family, parts)
        parts = {name: count for name, count in known.items() if name != model.kind.denoiser_name}
    text = sum(count for name, count in parts.items() if name != "vae")
    number = memory.BYTES[config.train.mixed_precision] if config.model.tune == "lora" else 4
    return number * text + 4 * parts.get("vae", 0)


def _encoders_at(folder: Path, family: type[Backbone]) -> dict[str, int]:
    """Return the parameters of the VAE and the text encoders whose configurations are in a pipeline's folder."""
    classes, found = {part.__name__: part for part in family.encoder_classes}, {}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
    for name in ("vae", *TEXT_ENCODERS):
        if not (folder / name / "config.json").is_file():
            continue
        with torch.device("meta"):
            if name == "vae":
                module = family.vae_class.from_config(family.vae_class.load_config(folder / name))
            else:
                loader = classes[index[name][1]]
                module = loader(loader.config_class.from_pretrained(folder / name))
        found[name] = sum(parameter.numel() for parameter in module.parameters())
    return found


def _from_folder(folder: Path, family: type[Backbone], origin: str) -> MetaModel:
    with torch.device("meta"):
        loader = family.denoiser_class
        denoiser = loader.from_config(loader.load_config(folder / family.denoiser_name))
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text(encoding="utf8")) if file.is_file() else None
    scale = _scale_factor(folder / "vae", family)
    return MetaModel(denoiser, family.family, origin, scale, scheduler, is_read=True, folder=folder)


def _scale_factor(folder: Path, family: type[Backbone]) -> int:
    """Return how many pixels a latent stands for in each direction; as published where no VAE is."""
    if not (folder / "config.json").is_file():
        return published.VAE_SCALES.get(family.family, 8)
    return family.scale_factor_of(family.vae_class.load_config(folder))
