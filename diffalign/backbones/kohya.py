"""Names of LoRA tensors and metadata in the layout of kohya's sd-scripts, which ComfyUI and A1111 read.

SD1.x and SD2.x LoRAs carry diffusers' module names; SDXL ones carry those of the original (LDM) UNet, whose blocks are
numbered through: input_blocks, middle_block, output_blocks.
"""

import re
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffalign.backbones.layer_names import LayerNames, Rename
from diffalign.errors import ModelError

EMBEDDINGS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_name(name: str, unet: nn.Module) -> str:
    """Return the original UNet's name of the diffusers module `name`, such as input_blocks.4.1.proj_in.

    Raises:
        ModelError: the original UNet has no such module.
    """
    if name in EMBEDDINGS:
        return EMBEDDINGS[name]
    if match := MID.fullmatch(name):
        kind, index, rest = match.groups()
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * int(index)}.{RESNET.get(rest, rest)}"
    match = BLOCK.fullmatch(name)
    if not match:
        raise ModelError(f'The original UNet has no counterpart of "{name}". Leave it out of target_modules.')
    side, level, kind, index, rest = match.groups()
    return _block_name(unet, side, int(level), kind, int(index), rest)


def _block_name(unet: nn.Module, side: str, level: int, kind: str, index: int, rest: str) -> str:
    layers = unet.config.layers_per_block + 1  # of an up block; a down block has as many with its downsampler
    if side == "down":
        number = 1 + level * layers + (layers - 1 if kind == "downsamplers" else index)
        prefix = f"input_blocks.{number}"
        if kind == "downsamplers":
            return f"{prefix}.0.op"
    else:
        prefix = f"output_blocks.{level * layers + (layers - 1 if kind == 'upsamplers' else index)}"
        if kind == "upsamplers":
            has_attention = getattr(unet.up_blocks[level], "attentions", None) is not None
            return f"{prefix}.{2 if has_attention else 1}.{rest}"
    return f"{prefix}.1.{rest}" if kind == "attentions" else f"{prefix}.0.{RESNET.get(rest, rest)}"


def unet_names(unet: nn.Module) -> LayerNames:
    """Return the names of the layers of `unet` in kohya's files: those of the original UNet if it is of SDXL's kind."""
    adaptable = (nn.Linear, nn.Conv2d, BaseTunerLayer)
    layers = [name for name, module in unet.named_modules() if isinstance(module, adaptable)]
    renames = []
    for name in layers:
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        with suppress(ModelError):  # unknown to other programs: refused by name where a LoRA has it
            renames.append(Rename(ldm_name(name, unet) if is_sdxl(unet) else name, (name,)))
    text_encoders = ("lora_te1_", "lora_te2_") if is_sdxl(unet) else ("lora_te_",)
    return LayerNames(tuple(renames), comfy_is_kohya=True, text_encoders=text_encoders)


def kohya_metadata(unet: nn.Module, rank: int, alpha: float, prediction_type: str, title: str) -> dict[str, str]:
    """Return the `ss_*` and `modelspec.*` entries by which user interfaces tell what a LoRA is for."""
    is_v2 = not is_sdxl(unet) and unet.config.cross_attention_dim == 1024
    is_v = prediction_type == "v_prediction"
    if is_sdxl(unet):
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif is_v2:
        version = "sd_v2_v" if is_v else "sd_v2"
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    else:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    values: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": float(alpha),
        "ss_base_model_version": version,
        "ss_v2": is_v2,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }
    return {key: str(value) for key, value in values.items()}


def is_sdxl(unet: nn.Module) -> bool:
    """Tell whether a UNet is of SDXL's kind, with pooled text and sizes among its inputs."""
    return unet.config.addition_embed_type == "text_time"
