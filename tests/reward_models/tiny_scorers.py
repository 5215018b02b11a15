"""Build a tiny scorer of every kind in its official layout, with random weights."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from reward_models.clip_score import ClipScoreRaw
from reward_models.image_reward import ImageReward, ImageRewardNetwork, bert_tokenizer
from reward_models.mps import MPS, MPSNetwork
from reward_models.pal import Pal, PalConfig
from reward_models.preprocess import PixelSpec
from reward_models.step_aware import StepAware
from tests.reward_models.toy import PROMPTS, SIZES

CROSS = {"layers": 2, "heads": 2, "dim_head": 8, "ff_mult": 2}
REWARD_SIZES = {
    "vision": {
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "text": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    },
    "head": [24, 16, 8, 4],
    "text_length": 12,
}


def build_all(root: Path, pickscore: Path, hpsv2: Path) -> dict[str, Path]:
    """Return the place of each scorer by name; the folders of the first two exist already."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        clip = build_clip_score(root / "clip", pickscore)
        places = {
            "aesthetic": build_aesthetic(root / "aesthetic"),
            "clip_score_hessel": clip,
            "clip_score_raw": clip,
            "clip_score_torchmetrics": clip,
            "hpsv2": hpsv2,
            "hpsv2.1": hpsv2,
            "image_reward": build_image_reward(root / "image_reward"),
            "mps": build_mps(root / "mps", pickscore),
            "pal": build_pal(root / "pal", pickscore),
            "pickscore": pickscore,
            "step_aware": build_step_aware(root / "step_aware", pickscore),
        }
    places["step_aware_sdxl"] = places["step_aware"]
    parts = [
        {"name": "pickscore", "path": str(pickscore), "weight": 0.1},
        {"name": "aesthetic", "path": "aesthetic", "weight": 1.0, "centre": 5.0, "scale": 2.0},
        {"name": "hpsv2", "path": str(hpsv2), "weight": -3.0, "centre": 0.25, "scale": 0.1},
    ]
    places["composite"] = root / "recipe.json"
    places["composite"].write_text(json.dumps({"scorers": parts}))
    return places


def build_clip_score(folder: Path, pickscore: Path) -> Path:
    config = CLIPConfig.from_pretrained(pickscore)
    config.text_config.hidden_act = config.vision_config.hidden_act = "quick_gelu"
    tokenizer = CLIPTokenizer.from_pretrained(pickscore)
    spec, module = PixelSpec(size=SIZES.image_size), CLIPModel(config)
    common = module.visual_projection.weight.sum(
        dim=1
    )  # a direction all embeddings share, so that cosines are positive
    module.vision_model.post_layernorm.bias.data.fill_(1.0)
    module.text_model.final_layer_norm.bias.data = torch.linalg.pinv(module.text_projection.weight.data) @ common
    return ClipScoreRaw(ClipScoreRaw.cards[0], module, spec, tokenizer, source="test").save(folder)


def build_aesthetic(folder: Path) -> Path:
    """Write the layout of the published folder: a flat vision config, and a head of five layers."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
        hidden_act="quick_gelu",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    state = CLIPVisionModelWithProjection(config).state_dict()
    save_file({**state, **published_head(16)}, folder / "model.safetensors")
    return folder


def published_head(dim: int) -> dict[str, torch.Tensor]:
    state, widths = {}, [dim, 12, 10, 8, 6, 1]
    for index, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{index}.weight"] = torch.randn(after, before) / math.sqrt(before) * 2
        state[f"layers.{index}.bias"] = torch.randn(after)
    return state


def build_image_reward(folder: Path) -> Path:
    folder.mkdir()
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    letters = [letter for word in map(chr, range(97, 123)) for letter in (word, f"##{word}")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(x for x in letters if x not in words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    module = ImageRewardNetwork(REWARD_SIZES)
    tokenizer = bert_tokenizer(folder / "vocab.txt")
    return ImageReward(ImageReward.cards[0], module, tokenizer, REWARD_SIZES, source="test").save(folder)


def build_mps(folder: Path, pickscore: Path) -> Path:
    config, tokenizer = CLIPConfig.from_pretrained(pickscore), CLIPTokenizer.from_pretrained(pickscore)
    module = MPSNetwork(config, CROSS)
    return MPS(MPS.cards[0], module, PixelSpec(size=SIZES.image_size), tokenizer, source="test").save(folder)


def build_pal(folder: Path, pickscore: Path) -> Path:
    scorer = Pal.from_clip(str(pickscore), PalConfig(users=("ann", "bob"), width=8))
    scorer.heads.user_logits.data = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    return scorer.save(folder)


def build_step_aware(folder: Path, pickscore: Path) -> Path:
    scorer = StepAware.from_clip(pickscore)
    for name, value in scorer.module.named_parameters():
        if "adaLN" in name:
            value.data += 0.3 * torch.randn_like(value)
    return scorer.save(folder)
