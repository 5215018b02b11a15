"""The layouts in which programs name a LoRA's tensors: what diffusers, kohya's sd-scripts and ComfyUI load."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from diffalign.backbones.files import write_atomically
from diffalign.backbones.layer_names import LayerNames, Rename
from diffalign.backbones.lora_factors import Factors, join, turn
from diffalign.backbones.lora_files import Lora
from diffalign.errors import ModelError

Written = tuple[dict[str, Tensor], dict[str, str]]  # tensors, metadata
COMFY_TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def diffusers(lora: Lora, names: LayerNames, denoiser_name: str) -> Written:
    """Return what `load_lora_weights` takes: lora_A, lora_B, and alphas in the metadata."""
    tensors, settings = {}, {}
    for network, layers in {denoiser_name: lora.layers, **lora.text}.items():
        for name, factors in layers.items():
            tensors[f"{network}.{name}.lora_A.weight"] = factors.down
            tensors[f"{network}.{name}.lora_B.weight"] = factors.up
        said = _peft_settings(layers, whole=network == denoiser_name)
        settings |= {f"{network}.{key}": value for key, value in said.items()}
    return tensors, {"format": "pt", **lora.metadata, LORA_ADAPTER_METADATA_KEY: json.dumps(settings)}


def kohya(lora: Lora, names: LayerNames, denoiser_name: str) -> Written:
    """Return what sd-scripts and A1111 load, and ComfyUI and diffusers in part: lora_unet_ with lora_down, lora_up."""
    layers, tensors = _original(lora, names), {}
    for name, factors in layers.items():
        tensors |= _with_alpha(f"lora_unet_{name.replace('.', '_')}", factors)
    for encoder, prefix in zip(COMFY_TEXT, names.text_encoders, strict=False):
        for name, factors in lora.text.get(encoder, {}).items():
            tensors |= _with_alpha(prefix + name.replace(".", "_"), factors)
    said = {
        "ss_network_module": names.network_module,
        "ss_network_dim": _one([factors.rank for factors in layers.values()]),
        "ss_network_alpha": _one([factors.alpha for factors in layers.values()]),
    }
    return tensors, {"format": "pt", **said, **lora.metadata}


def comfy(lora: Lora, names: LayerNames, denoiser_name: str) -> Written:
    """Return what ComfyUI loads: diffusion_model. before the original names, or those that it knows as well."""
    if names.comfy_is_kohya:
        return kohya(lora, names, denoiser_name)
    layers = _original(lora, names) if names.comfy_original else lora.layers
    spelled = _with_alpha if names.comfy_alpha else _without_alpha
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        tensors |= spelled(f"diffusion_model.{name}", factors)
    for encoder, there in COMFY_TEXT.items():
        for name, factors in lora.text.get(encoder, {}).items():
            tensors |= spelled(f"text_encoders.{there}.transformer.{name}", factors)
    return tensors, {"format": "pt", **lora.metadata}


LAYOUTS: dict[str, Callable[[Lora, LayerNames, str], Written]] = {
    "diffusers": diffusers,
    "kohya": kohya,
    "comfy": comfy,
}


def write(
    lora: Lora, layout: str, file: Path, names: LayerNames, denoiser_name: str, dtype: torch.dtype | None = None
) -> Path:
    """Write a LoRA in one of LAYOUTS; dtype: of the factors, their own when None. Alphas are float32.

    Raises:
        ModelError: it cannot be written (a previous file is intact).
    """
    tensors, metadata = LAYOUTS[layout](lora, names, denoiser_name)
    # Parts of what was fused share memory, which the format cannot say.
    stored = {
        key: tensor if key.endswith(".alpha") else tensor.detach().to("cpu", dtype).clone().contiguous()
        for key, tensor in tensors.items()
    }
    return write_atomically(file, lambda path: save_file(stored, path, metadata=metadata))


def _original(lora: Lora, names: LayerNames) -> dict[str, Factors]:
    """Return the updates by the names of the original network, those of fused layers joined."""
    parts: dict[Rename, dict[int, Factors]] = {}
    for name, factors in lora.layers.items():
        if (found := names.find(name)) is None:
            raise ModelError(f'The original network has no counterpart of "{name}". Leave it out of target_modules.')
        rename, part = found
        parts.setdefault(rename, {})[part or 0] = factors
    return dict(_joined(parts))


def _joined(parts: dict[Rename, dict[int, Factors]]) -> Iterator[tuple[str, Factors]]:
    for rename, found in parts.items():
        if len(rename.parts) > 1:
            yield rename.original, join([found.get(part) for part in range(len(rename.parts))], rename.shares)
        else:
            yield rename.original, turn(found[0]) if rename.turned else found[0]


def _with_alpha(stem: str, factors: Factors) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": factors.down,
        f"{stem}.lora_up.weight": factors.up,
        f"{stem}.alpha": torch.tensor(factors.alpha),
    }


def _without_alpha(stem: str, factors: Factors) -> dict[str, Tensor]:
    factors = factors.scaled_in()
    return {f"{stem}.lora_A.weight": factors.down, f"{stem}.lora_B.weight": factors.up}


def _peft_settings(layers: dict[str, Factors], whole: bool) -> dict[str, Any]:
    """Return what peft needs to know of these layers: the commonest rank and alpha, and where others stand.

    whole: the names are those in the network; otherwise their ends, since CLIP in newer transformers has no text_model.
    """
    rank = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in layers.values()).most_common(1)[0][0]
    named = {name if whole else name.removeprefix("text_model."): factors for name, factors in layers.items()}
    start = "^" if whole else ""
    ranks = {start + name: factors.rank for name, factors in named.items() if factors.rank != rank}
    alphas = {start + name: _whole(factors.alpha) for name, factors in named.items() if factors.alpha != alpha}
    settings: dict[str, Any] = {"r": rank, "lora_alpha": _whole(alpha), "target_modules": sorted(named)}
    return settings | {"lora_dropout": 0.0} | _given("rank_pattern", ranks) | _given("alpha_pattern", alphas)


def _given(name: str, pattern: dict[str, Any]) -> dict[str, Any]:
    return {name: pattern} if pattern else {}


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _one(values: list[Any]) -> str:
    """Return the value that all layers have, "Dynamic" (a word of sd-scripts) if they differ."""
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"
