"""Randomly initialised scorers of a few hundred thousand parameters, in the official folder formats."""

from dataclasses import dataclass
from pathlib import Path

import torch

from reward_models.errors import ScorerError
from reward_models.hpsv2 import HPSv2, build_clip
from reward_models.pickscore import PickScore
from reward_models.preprocess import PixelSpec
from reward_models.step_aware import StepAware
from reward_models.tokenization import read_merges


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Hold the sizes of a tiny CLIP; the defaults are those of the embedded world."""

    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 3
    heads: int = 4
    projection: int = 64
    text_length: int = 32


def build_tiny_pickscore(
    directory: str | Path, tokenizer_dir: str | Path, seed: int, sizes: TinySizes = TinySizes()
) -> Path:
    """Write a random PickScore folder (a Hugging Face CLIPModel) with the CLIP tokenizer of `tokenizer_dir`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    if not Path(tokenizer_dir).is_dir():
        raise ScorerError(f"There is no tokenizer folder {tokenizer_dir}. Expected vocab.json and merges.txt in it.")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.text_length,
        "projection_dim": sizes.projection,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 4 * sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "projection_dim": sizes.projection,
        "hidden_act": "gelu",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.projection))
    spec = PixelSpec(size=sizes.image_size)
    return PickScore(PickScore.cards[0], module, spec, tokenizer, source=str(directory)).save(directory)


def build_tiny_hpsv2(directory: str | Path, bpe_file: str | Path, seed: int, sizes: TinySizes = TinySizes()) -> Path:
    """Write a random HPSv2 folder (an open_clip CLIP) with the open_clip vocabulary `bpe_file`."""
    config = {
        "embed_dim": sizes.projection,
        "vision_cfg": {
            "image_size": sizes.image_size,
            "layers": sizes.vision_layers,
            "width": sizes.vision_width,
            "head_width": sizes.vision_width // sizes.heads,
            "patch_size": sizes.patch_size,
        },
        "text_cfg": {
            "context_length": sizes.text_length,
            "vocab_size": 512 + len(read_merges(bpe_file)) + 2,
            "width": sizes.text_width,
            "heads": sizes.heads,
            "layers": sizes.text_layers,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_clip(config, source=str(directory))
    spec = PixelSpec(size=sizes.image_size)
    return HPSv2(HPSv2.cards[0], module, spec, config, Path(bpe_file), source=str(directory)).save(directory)


def build_tiny_step_aware(directory: str | Path, pickscore: str | Path, seed: int) -> Path:
    """Write a step-aware model that scores as the PickScore folder `pickscore` at every timestep, to be trained."""
    return StepAware.from_clip(pickscore, seed=seed).save(directory)
