"""Write a tiny pipeline as a single file in the original (LDM) layout, the inverse of diffusers' from_single_file."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from diffalign.backbones.kohya import ldm_name

NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
VAE_RENAMES = (
    (r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
    (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
    (r"(decoder)\.up_blocks\.(\d+)\.resnets\.(\d+)", r"\1.up.\2.block.\3"),
    (r"(decoder)\.up_blocks\.(\d+)\.upsamplers\.0", r"\1.up.\2.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
CLIP_RENAMES = (
    ("final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
)


def write_single_file(folder: Path, file: Path, extra: dict | None = None) -> Path:
    """Write the pipeline at `folder` to `file` with the tensor names of the original checkpoints."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    tensors = _with_prefix("model.diffusion_model.", _unet(pipeline.unet))
    tensors |= _with_prefix("first_stage_model.", _vae(pipeline.vae))
    clip = {key.removeprefix("text_model."): value for key, value in pipeline.text_encoder.state_dict().items()}
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= _with_prefix("conditioner.embedders.0.transformer.text_model.", clip)
        tensors |= _with_prefix("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2))
    else:
        tensors |= _with_prefix("cond_stage_model.transformer.text_model.", clip)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in (tensors | (extra or {})).items()}, file)
    return file


def _unet(unet) -> dict:
    tensors = {}
    for key, value in unet.state_dict().items():
        module, _, kind = key.rpartition(".")
        end = module.rpartition(".")[2]
        if module == "conv_norm_out":
            name = "out.0"
        elif end in NORMS and "resnets" in module:
            name = ldm_name(module, unet).replace(end, NORMS[end])
        else:
            name = ldm_name(module, unet)
        tensors[f"{name}.{kind}"] = value
    return tensors


def _vae(vae) -> dict:
    tensors, last = {}, len(vae.config.block_out_channels) - 1
    for key, value in vae.state_dict().items():
        name = key
        for pattern, replacement in VAE_RENAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[name] = value[:, :, None, None] if is_attention else value  # once 1x1 convolutions
    return tensors


def _open_clip(encoder) -> dict:
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    tensors = {"text_projection": state.pop("text_projection.weight").T}
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        layer, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key).groups()
        tensors[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    for key, value in state.items():
        name = key
        for pattern, replacement in CLIP_RENAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    return tensors


def _with_prefix(prefix: str, tensors: dict) -> dict:
    return {prefix + key: value for key, value in tensors.items()}
