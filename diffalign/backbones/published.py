"""Configurations of SD1.5, SDXL base and flow transformers as published: to build them takes no hub and no cache."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import CLIPTokenizer

from diffalign.errors import ModelError

# stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json: 859,520,964 parameters.
UNET_SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "layers_per_block": 2,
}
# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json: 2,567,463,684 parameters.
UNET_SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd15": UNET_SD15, "sdxl": UNET_SDXL}

_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_CLIP_L = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
_CLIP_BIG_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# Per family: component folder -> (library, class, configuration).
COMPONENTS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "sd15": {
        "unet": ("diffusers", "UNet2DConditionModel", UNET_SD15),
        "vae": ("diffusers", "AutoencoderKL", _VAE | {"sample_size": 512, "scaling_factor": 0.18215}),
        "scheduler": ("diffusers", "PNDMScheduler", _SCHEDULE),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "tokenizer": ("transformers", "CLIPTokenizer", {"pad_token": "<|endoftext|>"}),
    },
    "sdxl": {
        "unet": ("diffusers", "UNet2DConditionModel", UNET_SDXL),
        "vae": ("diffusers", "AutoencoderKL", _VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", _SCHEDULE | {"timestep_spacing": "leading"}),
        "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_BIG_G),
        "tokenizer": ("transformers", "CLIPTokenizer", {"pad_token": "<|endoftext|>"}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {"pad_token": "!"}),
    },
}
# Parameters of what is downloaded; a test counts them.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
# Parameters of the text encoders and the VAE of families with a transformer; a test counts them.
FLOW_ENCODERS = {
    "sd3": {
        "text_encoder": 123_650_304,  # with a projection, which SD1.5's lacks
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,  # T5-XXL's encoder
        "vae": 83_819_683,
    },
    "flux": {"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "vae": 83_819_683},
    "pixart-alpha": {"text_encoder": 4_762_310_656, "vae": 83_653_863},
    "pixart-sigma": {"text_encoder": 4_762_310_656, "vae": 83_653_863},
    "zimage": {"text_encoder": 4_022_468_096, "vae": 83_819_683},
}
# Hub ids of models that have just these shapes.
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
VAES = (
    "madebyollin/sdxl-vae-fp16-fix",
    "stabilityai/sdxl-vae",
    "stabilityai/sd-vae-ft-mse",
    "stabilityai/sd-vae-ft-ema",
)
# Transformers as published, transformer/config.json of each hub id; the first of a family stands for others of it.
_SD3 = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24}
_SD3 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
_SD3 |= {"caption_projection_dim": 1536}
_SD35 = _SD3 | {"qk_norm": "rms_norm"}
# As many parameters as is published of them: 3.88, 9.08 and 32.2 billion.
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
_KLEIN_4B |= {"joint_attention_dim": 7680, "guidance_embeds": False}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
_KLEIN_9B |= {"joint_attention_dim": 12288, "guidance_embeds": False}
_SANA15 = {"qk_norm": "rms_norm_across_heads"}
_SIGMA = {"caption_channels": 4096, "use_additional_conditions": False}
TRANSFORMERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd3": {
        "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
        "stabilityai/stable-diffusion-3.5-medium": _SD35
        | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
        "stabilityai/stable-diffusion-3.5-large": _SD35
        | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    },
    "flux": {"black-forest-labs/FLUX.1-dev": {"guidance_embeds": True}},  # all else is the class's default
    "flux2": {
        "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
        "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
        "black-forest-labs/FLUX.2-dev": {},  # all is the class's default
    },
    "lumina2": {"Alpha-VLLM/Lumina-Image-2.0": {"cap_feat_dim": 2304}},  # the width of Gemma2
    # scripts/convert_pixart_alpha_to_diffusers.py and convert_pixart_sigma_to_diffusers.py of diffusers.
    "pixart-alpha": {
        "PixArt-alpha/PixArt-XL-2-1024-MS": {"caption_channels": 4096},
        "PixArt-alpha/PixArt-XL-2-512x512": {"caption_channels": 4096, "sample_size": 64},
    },
    "pixart-sigma": {
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _SIGMA,
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": _SIGMA | {"sample_size": 64},
        "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS": _SIGMA | {"sample_size": 256},
    },
    "qwen": {"Qwen/Qwen-Image": {}, "Qwen/Qwen-Image-2512": {}},  # the class's defaults
    # Of diffusers' scripts/convert_sana_to_diffusers.py; the class's defaults are the first's.
    "sana": {
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {},
        "Efficient-Large-Model/Sana_600M_1024px_diffusers": {"num_layers": 28, "num_attention_heads": 36}
        | {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152},
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": _SANA15,
        "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": _SANA15 | {"num_layers": 60},
    },
    "zimage": {
        "Tongyi-MAI/Z-Image": {"dim": 3840, "n_layers": 30, "n_heads": 30}
        | {"n_kv_heads": 30, "n_refiner_layers": 2, "cap_feat_dim": 2560},
    },
}
TRANSFORMER_CLASSES: dict[str, type[nn.Module]] = {
    "sd3": SD3Transformer2DModel,
    "flux": FluxTransformer2DModel,
    "flux2": Flux2Transformer2DModel,
    "lumina2": Lumina2Transformer2DModel,
    "pixart-alpha": PixArtTransformer2DModel,
    "pixart-sigma": PixArtTransformer2DModel,
    "qwen": QwenImageTransformer2DModel,
    "sana": SanaTransformer2DModel,
    "zimage": ZImageTransformer2DModel,
}
# What their schedulers say of the shift.
SHIFTS = {
    "sd3": {"shift": 3.0},
    "flux": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "flux2": {"use_dynamic_shifting": True},
    "lumina2": {"shift": 6.0},
    "qwen": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}
    | {"base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    "sana": {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "zimage": {"shift": 6.0},
}
VAE_SCALES = {"sana": 32}  # how many pixels a latent is high and wide; 8 of all others
CLIP_MERGES = 48894  # with 256 letters, 256 final letters and 2 marks they make the 49,408 tokens
PIPELINE_NAMES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def random_unet(
    family: str, torch_dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> UNet2DConditionModel:
    """Build the published UNet of "sd15" or "sdxl" with random weights, made in `torch_dtype` on `device`.

    For benchmarks and memory plans: "meta" as the device costs no memory.

    Raises:
        ModelError: another family.
    """
    if family not in UNETS:
        raise ModelError(f'No published UNet for "{family}". Available: {", ".join(UNETS)}.')
    return _random(UNet2DConditionModel, UNETS[family], torch_dtype, device, seed)


def random_transformer(
    hub_id: str, torch_dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> Any:
    """Build a transformer of TRANSFORMERS with random weights; arguments as of `random_unet`."""
    family = next(name for name, models in TRANSFORMERS.items() if hub_id in models)
    return _random(TRANSFORMER_CLASSES[family], TRANSFORMERS[family][hub_id], torch_dtype, device, seed)


def _random(
    network: type, settings: dict[str, Any], torch_dtype: torch.dtype, device: torch.device | str, seed: int
) -> Any:
    previous, device = torch.get_default_dtype(), torch.device(device)
    torch.set_default_dtype(torch_dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            return network(**settings)
    finally:
        torch.set_default_dtype(previous)


def write_config_folder(family: str, folder: Path) -> Path:
    """Write the family's pipeline folder without weights: model_index.json, configurations and tokenizers."""
    index: dict[str, Any] = {"_class_name": PIPELINE_NAMES[family]}
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    for name, (library, class_name, config) in COMPONENTS[family].items():
        index[name] = [library, class_name]
        target = folder / name
        target.mkdir(parents=True)
        if class_name == "CLIPTokenizer":
            clip_tokenizer(**config).save_pretrained(target)
        else:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            _write_json(target / file, {"_class_name": class_name} | config)
    if family == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)
    return folder


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Build OpenAI's CLIP tokenizer (49,408 tokens) from the merge table that open_clip ships.

    Raises:
        ModelError: open_clip is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            "The CLIP vocabulary is read from the package open_clip, which is not installed. Run "
            "`pip install open_clip_torch`, or name a diffusers folder with tokenizers as `config`."
        )
    table = Path(next(iter(package.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(table, "rt", encoding="utf-8") as stream:
        # The first line is a version and the table is longer than what CLIP uses of it.
        merges = [tuple(line.split()) for line in stream.read().split("\n")[1 : 1 + CLIP_MERGES]]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes in byte-level BPE, in CLIP's order (from "!")."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = range(0x100, 0x100 + 256 - len(printable))
    return [chr(code) for code in (*printable, *shifted)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
