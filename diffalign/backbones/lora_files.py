"""LoRA files of any layout, read into one form: the two factors and alpha of each layer, by diffusers' names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.backbones.files import LORA_FILE, PICKLE_SUFFIXES, pickle_message, read_header
from diffalign.backbones.layer_names import CLIP, LayerNames
from diffalign.backbones.lora_factors import Factors, divide, turn
from diffalign.backbones.lora_keys import Keys, Place, why_not
from diffalign.errors import ModelError

PEFT_CONFIG = "adapter_config.json"
SHOWN = 3  # keys in a message


@dataclass
class Lora:
    """Hold the updates of a denoiser's layers, and of text encoders'."""

    layers: dict[str, Factors]
    text: dict[str, dict[str, Factors]] = field(default_factory=dict)  # by the pipeline's name of the encoder
    metadata: dict[str, str] = field(default_factory=dict)  # of the file, but for what says alpha in diffusers' layout
    notes: list[str] = field(default_factory=list)  # what was assumed


class LoraFile:
    """A LoRA file of whatever layout; its tensors are read when they are asked for."""

    def __init__(self, file: Path):
        """Read the names of the tensors in `file`.

        Raises:
            ModelError: it is no safetensors file, is broken, or holds no LoRA of two factors a layer.
        """
        if file.suffix in PICKLE_SUFFIXES and file.is_file():
            raise ModelError(pickle_message(file))
        if not file.is_file():
            raise ModelError(f'There is no file "{file}". Give a .safetensors file of a LoRA, or the folder it is in.')
        self.file = file
        header = read_header(file)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.keys = Keys.of(header)
        self._check_kinds()

    @property
    def layout(self) -> str:
        """Return whose layout the file is in, in a word: "diffusers", "kohya", "comfy", "peft" ..."""
        return self.keys.layout

    def unknown(self, names: LayerNames) -> list[Place]:
        """Return the places of a denoiser that are no layers of the family with these names."""
        places = [place for place in self.keys.layers if place.network == "denoiser"]
        return [place for place in places if names.find(place.name, place.flat) is None]

    def check_known(self, names: LayerNames, family: str) -> None:
        """Refuse layers that are none of the family with these names; `family` is what the message calls it.

        Raises:
            ModelError: such a layer, named as the file does.
        """
        if unknown := self.unknown(names):
            first, number = unknown[0], len(unknown)
            keys = ", ".join(f'"{next(iter(self.keys.layers[place].values()))}"' for place in unknown[:SHOWN])
            near = names.nearest(first.name, first.flat)
            hint = f' Did you mean "{near}"?' if near else ""
            raise ModelError(
                f'{number} of the {len(self.keys.layers)} layers in the LoRA "{self.file}" are none of {family}: '
                f"{keys}{', ...' if number > SHOWN else ''}.{hint} Check that it was trained on this model family."
            )

    def read(self, names: LayerNames, family: str, text: bool = True) -> Lora:
        """Return the LoRA by diffusers' names; text: also that of the text encoders.

        Raises:
            ModelError: a key has no counterpart, a factor is missing or does not fit the other.
        """
        self.check_known(names, family)
        if text:
            self._check_text()
        try:
            tensors = load_file(self.file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f'Cannot read "{self.file}" ({error}). Download or export it again.') from error
        lora = Lora({}, metadata=dict(self.metadata))
        lora.metadata.pop(LORA_ADAPTER_METADATA_KEY, None)
        for place, roles in self.keys.layers.items():
            if place.network == "denoiser":
                self._add(lora.layers, place, names, self._factors(place, roles, names, tensors, lora))
            elif text:
                into = lora.text.setdefault(place.network, {})
                self._add(into, place, CLIP, self._factors(place, roles, CLIP, tensors, lora))
        if not text and (encoders := {place.network for place in self.keys.layers} - {"denoiser"}):
            lora.notes.append(f"left out, as asked: what it holds of {', '.join(sorted(encoders))}")
        return lora

    def _check_kinds(self) -> None:
        for key in self.keys.others:
            meaning = why_not(key)
            raise ModelError(
                f'"{self.file}" holds "{key}": '
                + (f"it is {meaning}. Only LoRAs of two factors a layer are understood here." if meaning else NO_LORA)
            )
        for place, roles in self.keys.layers.items():
            if missing := {"down", "up"} - roles.keys():
                have = next(iter(roles.values()))
                raise ModelError(f'"{self.file}" holds "{have}" but not its {missing.pop()} factor ({place.name}).')
        if not any(place.network == "denoiser" for place in self.keys.layers):
            raise ModelError(f'"{self.file}" has no LoRA tensors for a denoiser. Give a LoRA of one.')

    def _check_text(self) -> None:
        places = [place for place in self.keys.layers if place.network != "denoiser"]
        if language := [place for place in places if CLIP.find(place.name, place.flat) is None]:
            key = next(iter(self.keys.layers[language[0]].values()))
            raise ModelError(
                f'"{self.file}" adapts {len(language)} layers of text encoders that no layout here names, of T5 or a '
                f'language model: "{key}". Leave out what it holds of text encoders with '
                "`diffalign convert ... --without-text-encoders`."
            )

    def _factors(
        self, place: Place, roles: dict[str, str], names: LayerNames, tensors: Mapping[str, Tensor], lora: Lora
    ) -> Factors:
        down, up = tensors[roles["down"]], tensors[roles["up"]]
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
            raise ModelError(
                f'The factors of "{place.name}" in "{self.file}" do not fit: {list(down.shape)} and {list(up.shape)}.'
            )
        if "alpha" in roles:
            return Factors(down, up, float(f"{tensors[roles['alpha']].float().item():.7g}"))
        rename, part = _find(names, place)
        alpha = self._said_alpha(place, rename.parts[part or 0], down.shape[0])
        note = f"it says no alpha, so that alpha is the rank, as everywhere ({ASSUMED})"
        if alpha is None and note not in lora.notes:
            lora.notes.append(note)
        return Factors(down, up, float(down.shape[0] if alpha is None else alpha))

    def _said_alpha(self, place: Place, name: str, rank: int) -> float | None:
        """Return the alpha that the metadata, or peft's configuration beside the file, say."""
        settings = self._settings
        if place.network == "denoiser":
            found = next((settings[key] for key in ("transformer", "unet", "") if key in settings), None)
        else:
            found = settings.get(place.network)
        if found is None or "lora_alpha" not in found:
            return None
        pattern = found.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern, name), found["lora_alpha"])
        return alpha * rank**0.5 if found.get("use_rslora") else alpha

    @cached_property
    def _settings(self) -> dict[str, dict[str, Any]]:
        """Return peft's settings by the network they are of; "" where there is but one."""
        beside = self.file.parent / PEFT_CONFIG
        try:
            if LORA_ADAPTER_METADATA_KEY in self.metadata:
                flat = json.loads(self.metadata[LORA_ADAPTER_METADATA_KEY])
            elif beside.is_file() and self.file.name.startswith("adapter_model"):
                return {"": json.loads(beside.read_text(encoding="utf-8"))}
            else:
                return {}
        except ValueError as error:
            raise ModelError(f'What "{self.file}" says of its alpha is no JSON ({error}). Export it again.') from error
        settings: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            network, dot, setting = key.partition(".")
            settings.setdefault(network if dot else "", {})[setting if dot else key] = value
        return settings

    def _add(self, into: dict[str, Factors], place: Place, names: LayerNames, factors: Factors) -> None:
        rename, part = _find(names, place)
        if rename.turned and part is None:
            factors = turn(factors)
        whole = part is None and len(rename.parts) > 1
        found = divide(factors, rename.shares) if whole else [factors]
        for name, entry in zip(rename.parts if whole else [rename.parts[part or 0]], found, strict=True):
            if name in into:
                raise ModelError(
                    f'"{self.file}" adapts "{name}" twice, under two names. Which of them counts differs from program '
                    "to program: take one out."
                )
            if entry is not None:
                into[name] = entry


NO_LORA = "that is no tensor of a LoRA. Give a file with lora_A and lora_B, or lora_down and lora_up, of each layer."
ASSUMED = "diffusers, ComfyUI and sd-scripts take it so"


def check_fits(lora: Lora, denoiser: nn.Module, source: str | Path, model: str) -> None:
    """Refuse a LoRA whose layers are not all there in `denoiser`, or have other widths.

    Raises:
        ModelError: such a LoRA; `source` and `model` are what the message calls the two.
    """
    layers = dict(denoiser.named_modules())
    for name, factors in lora.layers.items():
        if name not in layers:
            raise ModelError(
                f'The LoRA "{source}" adapts "{name}", which the {type(denoiser).__name__} of {model} does not have: '
                "it was trained on a larger model, or on one of another kind."
            )
        weight = getattr(layers[name], "base_layer", layers[name]).weight
        found = [factors.up.shape[0], *factors.down.shape[1:]]
        if found != list(weight.shape[: len(found)]):
            raise ModelError(
                f'The LoRA "{source}" changes "{name}" by a matrix of {found}; that of {model} is '
                f"{list(weight.shape)}: it was trained on a model of another size or family."
            )


def find_file(source: Path) -> Path:
    """Return the LoRA file that `source` is or holds.

    Raises:
        ModelError: a folder with no such file, or with several.
    """
    if not source.is_dir():
        return source
    if (source / LORA_FILE).is_file():
        return source / LORA_FILE
    files = sorted(path for path in source.glob("*.safetensors") if "lora" in " ".join(read_header(path)))
    if len(files) == 1:
        return files[0]
    names = ", ".join(path.name for path in files)
    raise ModelError(
        f'"{source}" holds several LoRA files ({names}). Give one of them.'
        if files
        else f'"{source}" holds no LoRA file. Give the .safetensors file of one.'
    )


def _find(names: LayerNames, place: Place) -> Any:
    return (names if place.network == "denoiser" else CLIP).find(place.name, place.flat)
