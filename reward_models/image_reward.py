"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP reads the prompt while looking at the picture.

The network is transformers' BLIP; only the names of its weights are translated, so no timm or fairscale is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from reward_models.base import Scorer, ScorerCard, ScorerError
from reward_models.checkpoints import (
    first_existing,
    from_hub,
    is_hub_id,
    read_state_dict,
    save_safetensors,
    write_folder,
)
from reward_models.hf_clip import build, read_json, uncut_lengths, write_json
from reward_models.preprocess import PixelSpec, clip_tensor_aa
from reward_models.recipes import Recipe

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward over the authors' validation pictures
CONFIG_FILE = "image_reward.json"  # sizes of a network that is not the official one
VOCABULARY = ("bert-base-uncased", "vocab.txt")
OFFICIAL_FILE = "ImageReward.pt"
WEIGHT_FILES = ("model.safetensors", OFFICIAL_FILE)
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # left over from BLIP's pre-training

OFFICIAL_SIZES: dict[str, Any] = {
    "vision": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
    "head": [1024, 128, 64, 16],
    "text_length": 35,
}

# official name -> transformers' name, in this order; the text encoder's names are the same in both
_VISION_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward(Scorer):
    """Score by a linear head on the first token of a BERT that attends to the image."""

    cards = (
        ScorerCard(
            name="image_reward",
            weights=f"THUDM/ImageReward/{OFFICIAL_FILE}",
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=35,
            formula=f"(head(h_CLS) - {MEAN:.5f}) / {STD:.5f}; P(a > b) = sigmoid({STD:.5f} * (a - b))",
            scale="standardised: mean 0, standard deviation 1 over the authors' pictures",
            usual_range=(-2.0, 2.0),
            licence="Apache-2.0",
            traps=(
                "Prompts are cut to 35 word pieces, less than half of what CLIP reads.",
                "Training and P(a > b) use the raw reward, before standardising.",
                "ReFL's loss clips at 2: mean(relu(2 - r)) * 1e-3.",
                "The official package pins timm 0.6.13, breaks with transformers 5 and loads with strict=False.",
                "The official code crops palette and transparent pictures before converting them, here after.",
            ),
            source="THUDM/ImageReward @c1392c6d",
        ),
    )

    def __init__(self, card: ScorerCard, module: nn.Module, tokenizer: Any, sizes: Mapping[str, Any], *, source: str):
        super().__init__(card, module, source=source)
        self.tokenizer, self.sizes = tokenizer, sizes
        self.spec = PixelSpec(size=sizes["vision"]["image_size"])

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load the official ImageReward.pt, a .safetensors of the same names, or a folder with either.

        BERT's vocabulary is read from vocab.txt beside the weights, else fetched from the hub.
        """
        weights = _locate(path_or_id)
        state = from_official_names(read_state_dict(weights))
        own = weights.parent / CONFIG_FILE
        sizes = read_json(own) if own.is_file() else OFFICIAL_SIZES
        module = build(lambda: ImageRewardNetwork(sizes), state, weights, dtype)
        module.head.float()
        tokenizer = bert_tokenizer(_vocabulary(weights.parent))
        if len(tokenizer) > sizes["text"]["vocab_size"]:
            raise ScorerError(
                f"{path_or_id}: the vocabulary has {len(tokenizer)} tokens, the network knows "
                f"{sizes['text']['vocab_size']}. Put the vocab.txt the network was trained with beside the weights."
            )
        return cls(card, module, tokenizer, sizes, source=path_or_id)

    @property
    def text_length(self) -> int:
        """Return the number of word pieces a prompt is cut to, [CLS] and [SEP] included."""
        return self.sizes["text_length"]

    @property
    def preference_scale(self) -> float:
        """Return what makes a difference of scores the raw difference the network was trained with."""
        return STD

    @property
    def recipe(self) -> Recipe:
        """Return how the official transform makes pixels [3, size, size]."""
        return Recipe("clip_pil", self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size] through the differentiable filter."""
        return clip_tensor_aa(images, self.spec)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many word pieces each prompt has before it is cut, [CLS] and [SEP] included."""
        return uncut_lengths(self.tokenizer, prompts)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return word pieces and attention mask [N, L], padded to the longest: padding changes nothing."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.text_length, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the image tokens [N, 1 + patches, D] that the text encoder attends to."""
        weight = self.module.vision.embeddings.patch_embedding.weight
        return self.module.vision(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state

    def raw_rewards(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards [N] float32 that the pairwise loss trains: log sigmoid(better - worse)."""
        return self.module(features, *self.tokenize(prompts))

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the standardised rewards [N] float32."""
        self._report_cut(prompts)
        return (self.raw_rewards(features, prompts) - MEAN) / STD

    def save(self, directory: str | Path) -> Path:
        """Write weights under the official names, the sizes and the vocabulary."""
        return write_folder(directory, self._write)

    def _write(self, folder: Path) -> None:
        save_safetensors(to_official_names(self.module.state_dict()), folder / WEIGHT_FILES[0])
        write_json(folder / CONFIG_FILE, self.sizes)
        words = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        lines = [word for word, _ in words if word not in ("[DEC]", "[ENC]")]
        (folder / VOCABULARY[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


class ImageRewardNetwork(nn.Module):
    """Hold BLIP's image encoder, BERT with cross-attention in every layer, and the head of linear layers."""

    def __init__(self, sizes: Mapping[str, Any]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision, text = sizes["vision"], sizes["text"]
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6, hidden_act="gelu"))
        self.text = BlipTextModel(
            BlipTextConfig(
                **text,
                encoder_hidden_size=vision["hidden_size"],
                layer_norm_eps=1e-12,
                hidden_act="gelu",
                pad_token_id=0,
                bos_token_id=None,
                sep_token_id=None,
                is_decoder=True,  # gives every layer its cross-attention; the mask is bidirectional all the same
                hidden_dropout_prob=0.1,
                attention_probs_dropout_prob=0.1,
            ),
            add_pooling_layer=False,
        )
        widths = [text["hidden_size"], *sizes["head"]]
        linear = [nn.Linear(before, after) for before, after in zip(widths, [*widths[1:], 1], strict=True)]
        dropouts = (0.2, 0.2, 0.1)  # after the first three; there is no activation anywhere
        layers = [part for layer, p in zip(linear, dropouts, strict=False) for part in (layer, nn.Dropout(p))]
        self.head = nn.Sequential(*layers, *linear[len(dropouts) :])

    def forward(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return raw rewards [N] float32 of image tokens [N, I, D] and word pieces [N, L]."""
        hidden = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_tokens, is_decoder=False
        ).last_hidden_state
        first = self.head[0].weight
        return self.head(hidden[:, 0].to(first.dtype)).squeeze(-1)


def from_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official weights to those of `ImageRewardNetwork`; BLIP's unused projections are left out."""
    renamed = {}
    for key, value in state.items():
        if key.startswith(UNUSED):
            continue
        name = key.replace("blip.text_encoder.", "text.").replace("mlp.layers.", "head.")
        if key.startswith("blip.visual_encoder."):
            for old, new in _VISION_NAMES:
                name = name.replace(old, new)
        renamed[name] = value
    return renamed


def to_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_official_names`."""
    renamed = {}
    for key, value in state.items():
        name = key
        if key.startswith("vision."):
            for old, new in reversed(_VISION_NAMES):
                name = name.replace(new, old)
        elif key.startswith("text."):
            name = f"blip.text_encoder.{key.removeprefix('text.')}"
        else:
            name = f"mlp.layers.{key.removeprefix('head.')}"
        renamed[name] = value
    return renamed


def bert_tokenizer(vocabulary: Path) -> Any:
    """Return the tokenizer of a vocab.txt with BLIP's two extra tokens; [CLS] stays the first of a prompt."""
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a word may be a U+2028
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def _vocabulary(folder: Path) -> Path:
    """Return the vocab.txt in `folder`, else BERT's from the hub."""
    repository, name = VOCABULARY
    if (folder / name).is_file():
        return folder / name
    try:
        return from_hub(repository, file=name)
    except ScorerError as error:
        raise ScorerError(f"There is no {name} in {folder}: put that of {repository} there. {error}") from None


def _locate(path_or_id: str) -> Path:
    path = Path(path_or_id)
    if is_hub_id(path_or_id):
        owner, name, *file = path_or_id.split("/")
        return from_hub(f"{owner}/{name}", file=file[0] if file else OFFICIAL_FILE)
    if path.is_dir():
        return first_existing(path, WEIGHT_FILES)
    if not path.is_file():
        raise ScorerError(f"There is no file or folder {path}. Give {OFFICIAL_FILE} or a folder that holds it.")
    return path
