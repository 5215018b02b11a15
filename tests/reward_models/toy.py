"""A toy world for the scorers: tiny networks, flat coloured pictures and preferences one can state in a line."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reward_models.tiny import TinySizes

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "yellow": (200, 200, 40)}
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in ("square", "wall", "sheet", "carpet", "flag")]
SIZES = TinySizes(
    image_size=32, patch_size=8, vision_width=32, vision_layers=2, text_width=32, text_layers=2, heads=2, projection=16
)


def noise_image(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Return a picture of smooth random blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def flat_image(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """Return a picture of one colour with some noise."""
    noise = np.random.default_rng(seed).integers(-30, 31, (32, 32, 3))
    return Image.fromarray((np.asarray(colour) + noise).clip(0, 255).astype(np.uint8))


def brightness_pairs(count: int, seed: int) -> list[tuple]:
    """Return pairs in which the brighter picture wins, whatever the prompt says."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        dark, bright = rng.integers(20, 110), rng.integers(140, 230)
        label_0 = float(index % 2)
        first, second = (bright, dark) if label_0 else (dark, bright)
        images = [
            flat_image((int(level),) * 3, seed=10_000 * seed + 2 * index + side)
            for side, level in enumerate((first, second))
        ]
        pairs.append((*images, PROMPTS[index % len(PROMPTS)], label_0))
    return pairs


def colour_pairs(count: int, seed: int) -> list[tuple]:
    """Return pairs in which the picture of the colour named in the prompt wins: it takes both towers to learn."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        prompt = PROMPTS[rng.integers(len(PROMPTS))]
        named = prompt.split()[1]
        other = [colour for colour in COLOURS if colour != named][rng.integers(3)]
        label_0 = float(rng.integers(2))
        first, second = (named, other) if label_0 else (other, named)
        images = [
            flat_image(COLOURS[colour], seed=10_000 * seed + 2 * index + side)
            for side, colour in enumerate((first, second))
        ]
        pairs.append((*images, prompt, label_0))
    return pairs


def to_hf_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's CLIP weights to those of Hugging Face's CLIPModel, and reshape where they differ."""
    renamed = {}
    for key, value in state.items():
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        key = key.removeprefix("visual.")
        if key.startswith("transformer.resblocks."):
            _, _, layer, part = key.split(".", 3)
            renamed.update(_hf_block(f"{tower}.encoder.layers.{layer}.", part, value))
        elif key in ("proj", "text_projection"):
            renamed["visual_projection.weight" if key == "proj" else "text_projection.weight"] = value.T
        elif key == "logit_scale":
            renamed[key] = value
        else:
            renamed[f"{tower}.{_OUTSIDE_BLOCKS[key]}"] = value
    return {key: value.contiguous() for key, value in renamed.items()}


_OUTSIDE_BLOCKS = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    **{f"ln_pre.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_post.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")},
    **{f"ln_final.{kind}": f"final_layer_norm.{kind}" for kind in ("weight", "bias")},
}
_INSIDE_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _hf_block(prefix: str, part: str, value: Tensor) -> dict[str, Tensor]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return {
            f"{prefix}self_attn.{name}_proj.{kind}": piece for name, piece in zip("qkv", value.chunk(3), strict=True)
        }
    name, kind = part.rsplit(".", 1)
    return {f"{prefix}{_INSIDE_BLOCKS[name]}.{kind}": value}


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Return smooth images [count, 3, size, size] in [0, 1] that are exact in 8 bits."""
    pictures = [np.asarray(noise_image(seed + index, size, size)) for index in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
