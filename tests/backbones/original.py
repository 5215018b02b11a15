"""Weights of transformers as their original code names and orders them, the inverse of diffusers' conversions."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffalign.backbones.families import BY_NAME

# What is no layer that a LoRA can adapt, and so has no entry in a family's layer names.
_SD3 = (
    (r"attn(2?)\.norm_([qk])", r"x_block.attn\1.ln_\2"),
    (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
    ("transformer_blocks", "joint_blocks"),
    (r"pos_embed\.pos_embed", "pos_embed"),
)
_FLUX = tuple(
    (rf"^{block}\.(\d+)\.attn\.norm_{added}{letter}\.weight", rf"{original}{word}_norm.scale")
    for block, added, original in (
        ("transformer_blocks", "", r"double_blocks.\1.img_attn.norm."),
        ("transformer_blocks", "added_", r"double_blocks.\1.txt_attn.norm."),
        ("single_transformer_blocks", "", r"single_blocks.\1.norm."),
    )
    for letter, word in (("q", "query"), ("k", "key"))
)
NORMS = {"sd3": _SD3, "flux": _FLUX, "flux2": _FLUX, "zimage": ((r"norm_([qk])\.", r"\1_norm."),), "qwen": ()}


def original(family: str, denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as the original network names and orders them."""
    if family == "qwen":  # as Comfy-Org publishes them: in diffusers' names
        return {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    names, weights, state = BY_NAME[family].layer_names(), {}, denoiser.state_dict()
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        if (found := names.find(layer)) is None:
            for there, here in NORMS[family]:
                key = re.sub(there, here, key)
            weights[key] = tensor.clone()
            continue
        rename, part = found
        if rename.turned and len(tensor) == 2 * state[f"{layer}.weight"].shape[1]:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        weights.setdefault(f"{rename.original}.{kind}", {})[part] = tensor
    return {
        key: torch.cat([entry[part] for part in sorted(entry)]) if isinstance(entry, dict) else entry
        for key, entry in weights.items()
    }


def write_original(family: str, denoiser: torch.nn.Module, file: Path, prefix: str = "", extra=None) -> Path:
    """Write them to `file`, with `prefix` before each name, and other tensors beside them."""
    weights = {prefix + key: tensor.contiguous() for key, tensor in original(family, denoiser).items()}
    save_file(weights | (extra or {}), file)
    return file


def write_header(file: Path, shapes: dict[str, list[int]], dtype: str = "BF16") -> Path:
    """Write a file of two bytes a number whose header is all there is of it: the rest is a hole that takes no disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file
