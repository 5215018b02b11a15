"""What scorers on a Hugging Face CLIPModel share: loading one from anywhere, its pixels, tokens and embeddings."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reward_models import towers
from reward_models.base import ScorerCard, ScorerError
from reward_models.checkpoints import (
    first_existing,
    from_hub,
    is_hub_id,
    load_strict,
    read_state_dict,
    save_safetensors,
    skip_random_init,
    write_folder,
)
from reward_models.preprocess import PixelSpec, clip_tensor_aa
from reward_models.recipes import Recipe
from reward_models.tokenization import bundled_bpe_file, hf_tokenizer, read_merges
from reward_models.two_tower import TwoTowerScorer

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG_FILES = ("*.json", "*.txt")


def clip_config(
    *, projection: int, text: tuple[int, int, int], vision: tuple[int, int, int], patch: int, activation: str
) -> dict[str, Any]:
    """Return the config.json of a CLIPModel; a tower is (width, layers, heads), its MLP four times as wide."""
    towers = {
        f"{kind}_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "projection_dim": projection,
        }
        for kind, (width, layers, heads) in {"text": text, "vision": vision}.items()
    }
    towers["text_config"]["eos_token_id"] = 49407
    towers["vision_config"]["patch_size"] = patch
    return {"projection_dim": projection, **towers}


# laion/CLIP-ViT-H-14-laion2B-s32B-b79K: exact GELU, unlike OpenAI's own models
VIT_H_14 = clip_config(projection=1024, text=(1024, 24, 16), vision=(1280, 32, 16), patch=14, activation="gelu")
OPENAI_VIT_L_14 = clip_config(
    projection=768, text=(768, 12, 12), vision=(1024, 24, 16), patch=14, activation="quick_gelu"
)
OPENAI_VIT_B_32 = clip_config(
    projection=512, text=(512, 12, 8), vision=(768, 12, 12), patch=32, activation="quick_gelu"
)


class HFClipScorer(TwoTowerScorer):
    """Score by a Hugging Face CLIPModel; a subclass says which one is official and what becomes of the cosine."""

    official_config: ClassVar[Mapping[str, Any]] = VIT_H_14  # for a weights file without a config beside it
    activation: ClassVar[str | None] = "gelu"  # what the network was trained with; None: as its config says

    def __init__(self, card: ScorerCard, module: nn.Module, spec: PixelSpec, tokenizer: Any, *, source: str):
        super().__init__(card, module, spec, source=source)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a Hugging Face CLIPModel folder or hub id, or a lone weights file of the official size.

        The folder's own preprocessor and tokenizer are used where it has them, else those of the official model.
        """
        folder, weights = locate(path_or_id)
        config = read_config(folder, cls.official_config, activation=cls.activation)
        state = read_state_dict(weights)  # before the network is built: a broken file is reported at once
        module = build(lambda: cls.network(config), state, weights, dtype)
        tokenizer = load_tokenizer(folder, config, path_or_id)
        return cls(card, module, load_spec(folder, config.vision_config.image_size), tokenizer, source=path_or_id)

    @classmethod
    def network(cls, config: Any) -> nn.Module:
        """Build the CLIPModel of a config, with any weights."""
        from transformers import CLIPModel

        return CLIPModel(config)

    @property
    def clip(self) -> nn.Module:
        """Return the CLIPModel."""
        return self.module

    @property
    def text_length(self) -> int:
        """Return the number of tokens a prompt is cut to, start and end token included."""
        return self.clip.config.text_config.max_position_embeddings

    @property
    def recipe(self) -> Recipe:
        """Return how the official processor makes pixels [3, size, size]."""
        return Recipe("clip_pil", self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size] through the differentiable filter."""
        return clip_tensor_aa(images, self.spec)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [N, text_length], padded so that an embedding does not depend on its batch."""
        arguments = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        return self.tokenizer(list(prompts), return_tensors="pt", **arguments).input_ids

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has before it is cut, start and end token included."""
        return uncut_lengths(self.tokenizer, prompts)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return image embeddings [N, D], not normalised."""
        tower = self.clip.vision_model
        if not towers.is_usable(tower, pixels):
            return self.clip.visual_projection(tower(pixel_values=pixels).pooler_output)
        stem = tower.embeddings
        x = towers.embed_patches(pixels, stem.patch_embedding, stem.class_embedding, stem.position_embedding.weight)
        first = torch.zeros(len(x), dtype=torch.long)
        x = towers.run(towers.transformers_blocks(tower.encoder.layers), tower.pre_layrnorm(x), first, causal=False)
        return self.clip.visual_projection(tower.post_layernorm(x))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [N, D], not normalised; attention is causal, so padding needs no mask."""
        tower = self.clip.text_model
        if not towers.is_usable(tower, tokens):
            return self.clip.text_projection(tower(input_ids=tokens).pooler_output)
        # as CLIPTextModel: configurations older than transformers 4.31 say 2 and mean the largest id
        legacy = tower.eos_token_id == 2
        read = tokens.argmax(dim=-1) if legacy else (tokens == tower.eos_token_id).int().argmax(dim=-1)
        stem = tower.embeddings
        x = towers.embed_words(tokens, read, stem.token_embedding.weight, stem.position_embedding.weight)
        x = towers.run(towers.transformers_blocks(tower.encoder.layers), x, read, causal=True)
        return self.clip.text_projection(tower.final_layer_norm(x))

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image tower's parameters: embeddings, each layer (the last with its norm), projection."""
        tower = self.clip.vision_model
        *layers, last = (list(layer.parameters()) for layer in tower.encoder.layers)
        stem = [*tower.embeddings.parameters(), *tower.pre_layrnorm.parameters()]
        last_with_norm = [*last, *tower.post_layernorm.parameters()]
        return [stem, *layers, last_with_norm, list(self.clip.visual_projection.parameters())]

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text tower's parameters: embeddings, each layer."""
        tower = self.clip.text_model
        return [list(tower.embeddings.parameters()), *(list(layer.parameters()) for layer in tower.encoder.layers)]

    def save(self, directory: str | Path) -> Path:
        """Write the folder transformers reads: config, safetensors, preprocessor and tokenizer."""
        return write_folder(directory, self._write)

    def _write(self, folder: Path) -> None:
        self.clip.config.architectures = ["CLIPModel"]
        self.clip.config.save_pretrained(folder)
        save_safetensors(self.module.state_dict(), folder / WEIGHT_FILES[0])
        save_tokenizer(self.tokenizer, folder, self.text_length)
        write_json(folder / "preprocessor_config.json", preprocessor_config(self.spec))


def locate(path_or_id: str) -> tuple[Path | None, Path]:
    """Return the folder with the configs, None for a lone weights file, and the weights file."""
    path = Path(path_or_id)
    if is_hub_id(path_or_id):
        owner, name, *file = path_or_id.split("/")
        if file:
            return None, from_hub(f"{owner}/{name}", file=file[0])
        path = from_hub(path_or_id, patterns=[*CONFIG_FILES, WEIGHT_FILES[0]])
        if not (path / WEIGHT_FILES[0]).is_file():
            path = from_hub(path_or_id, patterns=[*CONFIG_FILES, WEIGHT_FILES[1]])
    if path.is_dir():
        return path, first_existing(path, WEIGHT_FILES)
    if not path.is_file():
        raise ScorerError(f"There is no file or folder {path}. Give a Hugging Face CLIPModel folder or a hub id.")
    return (path.parent if (path.parent / "config.json").is_file() else None), path


def build(make: Callable[[], nn.Module], state: Mapping[str, Tensor], source: Path, dtype: torch.dtype) -> nn.Module:
    """Return the network of `make` with the weights of `state` in `dtype`; logit_scale keeps its precision."""
    with skip_random_init():
        module = make()
    load_strict(module, state, source)
    scales = {name: value.detach().clone() for name, value in module.named_parameters() if name.endswith("logit_scale")}
    module.to(dtype)
    for name, value in scales.items():
        module.get_parameter(name).data = value  # bf16 would round 100 to 98.9
    return module


def read_config(folder: Path | None, official: Mapping[str, Any], *, activation: str | None) -> Any:
    """Return the CLIPConfig of a folder, or the official one; refuse an activation the weights were not made with.

    The wrong GELU moves a cosine by thousandths and changes no shape, so nothing else would notice it.
    """
    content = read_json(folder / "config.json") if folder else official
    return parse_config(content, f"{folder}/config.json", activation=activation)


def parse_config(content: Mapping[str, Any], source: str, *, activation: str | None) -> Any:
    """Return the CLIPConfig that a config.json describes; raise ScorerError for another activation."""
    from transformers import CLIPConfig

    config = CLIPConfig.from_dict(dict(content))
    found = {kind: getattr(config, f"{kind}_config").hidden_act for kind in ("text", "vision")}
    wrong = [f"{kind}_config.hidden_act = {value}" for kind, value in found.items() if activation not in (None, value)]
    if wrong:
        raise ScorerError(
            f"{source}: {' and '.join(wrong)}, but this scorer's network was trained with {activation}. "
            "Correct the config; a network of your own has to use the same activation."
        )
    return config


def read_json(file: Path) -> Mapping[str, Any]:
    """Return the content of a configuration file; raise ScorerError that says what to do about a broken one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScorerError(f"{file.parent} has no {file.name}, so the network's sizes are unknown. Add it.") from None
    except (OSError, ValueError) as error:
        raise ScorerError(f"Cannot read {file} ({error}). Restore it from the original checkpoint.") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a configuration file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path | None, config: Any, source: str) -> Any:
    """Return the folder's CLIPTokenizer, or the official one; raise ScorerError if the network knows fewer tokens."""
    from transformers import CLIPTokenizer

    has_own = folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if has_own:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    else:
        tokenizer = hf_tokenizer(read_merges(bundled_bpe_file()))
    known = config.text_config.vocab_size
    if len(tokenizer) > known:
        raise ScorerError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the network knows {known}. "
            "Put the tokenizer the network was trained with (vocab.json and merges.txt) into its folder."
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, text_length: int) -> None:
    """Write a tokenizer into `folder` in the layouts of transformers 4 and 5."""
    tokenizer.model_max_length = text_length
    # a call leaves its padding and truncation in the backend, which would be saved too
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, or vocab.txt


def uncut_lengths(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each prompt, special ones included, without cutting or padding."""
    if not prompts:
        return []
    return [len(ids) for ids in tokenizer(list(prompts), padding=False, truncation=False, verbose=False).input_ids]


def load_spec(folder: Path | None, size: int) -> PixelSpec:
    """Return the preprocessing that a folder asks for, or CLIP's own at the network's size."""
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        file = folder / "preprocessor_config.json"
        return PixelSpec.from_clip_config(read_json(file), image_size=size, source=str(file))
    if folder is not None and (folder / "processor_config.json").is_file():  # where transformers 5 saves it
        file = folder / "processor_config.json"
        return PixelSpec.from_clip_config(read_json(file).get("image_processor", {}), image_size=size, source=str(file))
    return PixelSpec(size=size)


def preprocessor_config(spec: PixelSpec) -> dict[str, Any]:
    """Return the preprocessor_config.json with which transformers prepares pixels as `spec` says."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
