"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): a CLIP ViT-H fine-tuned on Pick-a-Pic choices."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

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
from reward_models.preprocess import PixelSpec, clip_pil, clip_tensor_aa
from reward_models.tokenization import bundled_bpe_file, hf_tokenizer, read_merges
from reward_models.two_tower import TwoTowerScorer

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG_FILES = ("*.json", "*.txt")

# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, for a weights file without a config beside it
OFFICIAL_CONFIG: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}


class PickScore(TwoTowerScorer):
    """Score by exp(logit_scale) * cosine of a Hugging Face CLIPModel."""

    is_scaled = True
    cards = (
        ScorerCard(
            name="pickscore",
            weights="yuvalkirstain/PickScore_v1",
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=77,
            formula="exp(logit_scale) * <e_image, e_text>; P(a > b) = sigmoid(a - b)",
            scale="about 100 x cosine",
            usual_range=(17.0, 24.0),
            licence="MIT",
            traps=(
                "Scores of different prompts are not comparable: each prompt has its own offset.",
                "The wrappers in the DiffusionDPO, SmPO and SePPO repositories return the cosine, 100 times smaller.",
                "flow_grpo divides by 26.",
                "score_tensor resizes with an antialiased tensor filter; the network was trained on PIL's.",
            ),
            source="yuvalkirstain/PickScore @f79607ff",
        ),
    )

    def __init__(self, card: ScorerCard, module: nn.Module, spec: PixelSpec, tokenizer: Any, *, source: str):
        super().__init__(card, module, spec, source=source)
        self.tokenizer = tokenizer
        self.text_length = module.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a Hugging Face CLIPModel folder or hub id, or a lone weights file of the official size.

        The folder's own preprocessor and tokenizer are used where it has them, else those of the official model.
        """
        from transformers import CLIPConfig, CLIPModel

        folder, weights = _locate(path_or_id)
        config = CLIPConfig.from_dict(_read_json(folder / "config.json") if folder else OFFICIAL_CONFIG)
        state = read_state_dict(weights)  # before the network is built: a broken file is reported at once
        with skip_random_init():
            module = CLIPModel(config)
        load_strict(module, state, weights)
        tokenizer = _load_tokenizer(folder)
        if len(tokenizer) > config.text_config.vocab_size:
            known = config.text_config.vocab_size
            raise ScorerError(
                f"{path_or_id}: the tokenizer has {len(tokenizer)} tokens, the network knows {known}. "
                "Put the tokenizer the network was trained with (vocab.json and merges.txt) into its folder."
            )
        logit_scale = module.logit_scale.detach().clone()
        module.to(dtype).logit_scale.data = logit_scale  # bf16 would round 100 to 98.9
        return cls(card, module, _load_spec(folder, config.vision_config.image_size), tokenizer, source=path_or_id)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return pixels [3, size, size] as the official processor."""
        return clip_pil(image, self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size] through the differentiable filter."""
        return clip_tensor_aa(images, self.spec)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [N, text_length], padded so that an embedding does not depend on its batch."""
        arguments = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        return self.tokenizer(list(prompts), return_tensors="pt", **arguments).input_ids

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return image embeddings [N, D], not normalised."""
        return self.module.visual_projection(self.module.vision_model(pixel_values=pixels).pooler_output)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [N, D], not normalised; attention is causal, so padding needs no mask."""
        return self.module.text_projection(self.module.text_model(input_ids=tokens).pooler_output)

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image tower's parameters: embeddings, each layer (the last with its norm), projection."""
        tower = self.module.vision_model
        *layers, last = (list(layer.parameters()) for layer in tower.encoder.layers)
        stem = [*tower.embeddings.parameters(), *tower.pre_layrnorm.parameters()]
        last_with_norm = [*last, *tower.post_layernorm.parameters()]
        return [stem, *layers, last_with_norm, list(self.module.visual_projection.parameters())]

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text tower's parameters: embeddings, each layer."""
        tower = self.module.text_model
        return [list(tower.embeddings.parameters()), *(list(layer.parameters()) for layer in tower.encoder.layers)]

    def save(self, directory: str | Path) -> Path:
        """Write the folder transformers reads: config, safetensors, preprocessor and tokenizer."""
        return write_folder(directory, self._write)

    def _write(self, folder: Path) -> None:
        self.module.config.architectures = ["CLIPModel"]
        self.module.config.save_pretrained(folder)
        save_safetensors(self.module.state_dict(), folder / WEIGHT_FILES[0])
        self.tokenizer.model_max_length = self.text_length
        # a call leaves its padding and truncation in the backend, which would be saved too
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for transformers 4
        preprocessor = preprocessor_config(self.spec)
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


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


def _locate(path_or_id: str) -> tuple[Path | None, Path]:
    """Return the folder with the configs, None for a lone weights file, and the weights file."""
    path = Path(path_or_id)
    if is_hub_id(path_or_id):
        path = from_hub(path_or_id, patterns=[*CONFIG_FILES, WEIGHT_FILES[0]])
        if not (path / WEIGHT_FILES[0]).is_file():
            path = from_hub(path_or_id, patterns=[*CONFIG_FILES, WEIGHT_FILES[1]])
    if path.is_dir():
        return path, first_existing(path, WEIGHT_FILES)
    if not path.is_file():
        raise ScorerError(f"There is no file or folder {path}. Give a Hugging Face CLIPModel folder or a hub id.")
    return (path.parent if (path.parent / "config.json").is_file() else None), path


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScorerError(f"{file.parent} has no {file.name}, so the network's sizes are unknown. Add it.") from None
    except (OSError, ValueError) as error:
        raise ScorerError(f"Cannot read {file} ({error}). Restore it from the original checkpoint.") from None


def _load_tokenizer(folder: Path | None) -> Any:
    from transformers import CLIPTokenizer

    has_own = folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if not has_own:
        return hf_tokenizer(read_merges(bundled_bpe_file()))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _load_spec(folder: Path | None, image_size: int) -> PixelSpec:
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        file = folder / "preprocessor_config.json"
        return PixelSpec.from_clip_config(_read_json(file), image_size=image_size, source=str(file))
    if folder is not None and (folder / "processor_config.json").is_file():  # where transformers 5 saves it
        file = folder / "processor_config.json"
        return PixelSpec.from_clip_config(
            _read_json(file).get("image_processor", {}), image_size=image_size, source=str(file)
        )
    return PixelSpec(size=image_size)
