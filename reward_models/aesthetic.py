"""LAION's aesthetic score v2 ("improved-aesthetic-predictor"): an affine map of OpenAI's ViT-L/14 embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import Scorer, ScorerCard, ScorerError
from reward_models.checkpoints import read_state_dict, save_safetensors, write_folder
from reward_models.hf_clip import (
    OPENAI_VIT_L_14,
    WEIGHT_FILES,
    build,
    load_spec,
    locate,
    parse_config,
    preprocessor_config,
    read_json,
    write_json,
)
from reward_models.preprocess import PixelSpec, clip_tensor_aa
from reward_models.recipes import Recipe

OFFICIAL_CLIP = "openai/clip-vit-large-patch14"
CLIP_FOLDER = "clip"  # beside a lone head file: the CLIP it belongs to, where it is not to be downloaded
ACTIVATION = "quick_gelu"  # of OpenAI's CLIP
HEAD_LAYERS = (0, 2, 4, 6, 7)  # the Linear layers among the dropouts of the published heads
VISION_PREFIXES = ("vision_model.", "visual_projection.")


class Aesthetic(Scorer):
    """Score pictures without their prompts: w . x / |x| + b for the projected image embedding x."""

    cards = (
        ScorerCard(
            name="aesthetic",
            weights="shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=None,
            formula="w . x / |x| + b, x the ViT-L/14 image embedding; the published five layers have no activation",
            scale="ratings from 1 to 10",
            usual_range=(4.0, 7.0),
            licence="Apache-2.0",
            traps=(
                "Without normalising the embedding the scores are absurd: 20 to 30 for pictures.",
                "The prompt is not read: a beautiful picture of something else scores high.",
                "sac+logos+ava1 and ava+logos are different heads; the reluMSE head and version 1 are other networks.",
                "The original code runs CLIP in fp16, which moves scores by a few thousandths.",
            ),
            source="christophschuhmann/improved-aesthetic-predictor @6934dd81",
        ),
    )

    def __init__(self, card: ScorerCard, module: nn.Module, spec: PixelSpec, *, source: str):
        super().__init__(card, module, source=source)
        self.spec = spec

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder or hub id with vision tower and head, or one of the published head files.

        A head file holds no CLIP: it is taken from the folder `clip` beside the file, else OpenAI's from the hub.
        """
        folder, weights = locate(path_or_id)
        state = read_state_dict(weights)
        head = fold_head({key: value for key, value in state.items() if not key.startswith(VISION_PREFIXES)}, weights)
        if len(state) == 2 * len(HEAD_LAYERS):  # nothing but the head
            beside = weights.parent / CLIP_FOLDER
            folder, weights = locate(str(beside) if beside.is_dir() else OFFICIAL_CLIP)
            state = read_state_dict(weights)
        config = _read_vision_config(folder)
        vision = {key: value for key, value in state.items() if key.startswith(VISION_PREFIXES)}
        module = build(lambda: _Network(config), {**_prefixed(vision, "clip."), **head}, weights, dtype)
        module.head.float()
        return cls(card, module, load_spec(folder, config.image_size), source=path_or_id)

    @property
    def recipe(self) -> Recipe:
        """Return how OpenAI's transform makes pixels [3, size, size]."""
        return Recipe("clip_pil", self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size] through the differentiable filter."""
        return clip_tensor_aa(images, self.spec)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return unit image embeddings [N, D] float32."""
        weight = self.module.clip.visual_projection.weight
        embeddings = self.module.clip(pixel_values=pixels.to(weight.device, weight.dtype)).image_embeds
        return F.normalize(embeddings.float(), dim=-1)

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] of unit embeddings [N, D]; the prompts are not read."""
        return self.module.head(features).squeeze(-1)

    def save(self, directory: str | Path) -> Path:
        """Write one folder with the vision tower and the folded head."""
        return write_folder(directory, self._write)

    def _write(self, folder: Path) -> None:
        self.module.clip.config.save_pretrained(folder)
        state = {key.removeprefix("clip."): value for key, value in self.module.state_dict().items()}
        save_safetensors(state, folder / WEIGHT_FILES[0])
        write_json(folder / "preprocessor_config.json", preprocessor_config(self.spec))


class _Network(nn.Module):
    """Hold the vision tower with its projection, and the affine head."""

    def __init__(self, config):
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.clip = CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(config.projection_dim, 1)


def fold_head(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return "head.weight" [1, D] and "head.bias" [1] float32 of a head that is five Linear layers or folded already.

    w = W5 W4 W3 W2 W1 and b = W5 (... (W2 b1 + b2) ...) + b5, in float64. Raises ScorerError for other heads.
    """
    if set(state) == {"head.weight", "head.bias"}:
        return dict(state)
    state = {key.removeprefix("predictor."): value for key, value in state.items()}
    expected = [f"layers.{index}.{kind}" for index in HEAD_LAYERS for kind in ("weight", "bias")]
    if set(state) != set(expected):
        raise ScorerError(
            f"{source} is not LAION's linear head: expected layers {', '.join(map(str, HEAD_LAYERS))}, "
            f"got {sorted(state)[:12]}. Layers 0, 3, 6, 9, 11 are the reluMSE head and a single weight is version 1: "
            "both are other scorers. Use sac+logos+ava1-l14-linearMSE.pth."
        )
    weight, bias = None, None
    for index in HEAD_LAYERS:
        layer, shift = state[f"layers.{index}.weight"].double(), state[f"layers.{index}.bias"].double()
        weight, bias = (layer, shift) if weight is None else (layer @ weight, layer @ bias + shift)
    return {"head.weight": weight.float(), "head.bias": bias.float()}


def _read_vision_config(folder: Path | None) -> Any:
    """Return the CLIPVisionConfig in a config.json of a vision tower alone or of a whole CLIP, or OpenAI's."""
    content = dict(read_json(folder / "config.json")) if folder else OPENAI_VIT_L_14
    if "vision_config" not in content:  # a vision tower alone
        content = {"vision_config": content, "projection_dim": content.get("projection_dim", 512)}
    whole = parse_config(
        {**content, "text_config": {"hidden_act": ACTIVATION}}, f"{folder}/config.json", activation=ACTIVATION
    )
    whole.vision_config.projection_dim = whole.projection_dim
    return whole.vision_config


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}
