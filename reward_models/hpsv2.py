"""HPSv2 and HPSv2.1 (Wu et al. 2023, arXiv:2306.09341): an open_clip ViT-H fine-tuned on HPDv2 rankings."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

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
from reward_models.preprocess import PixelSpec, hps_letterbox
from reward_models.recipes import Recipe
from reward_models.tokenization import bundled_bpe_file, read_merges
from reward_models.two_tower import TwoTowerScorer

CONFIG_FILE = "open_clip_config.json"
BPE_FILE = "bpe.txt.gz"  # beside the config: the vocabulary of a network that does not use the official one
OFFICIAL_FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", *OFFICIAL_FILES)

# ViT-H-14, for a weights file without a config beside it
OFFICIAL_MODEL: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
# what `towers` knows of a tower; everything else that open_clip can build runs as open_clip runs it
SIZES = {*OFFICIAL_MODEL["vision_cfg"], *OFFICIAL_MODEL["text_cfg"], "mlp_ratio"}

_HPSV2 = ScorerCard(
    name="hpsv2",
    weights="xswu/HPSv2/HPS_v2_compressed.pt",
    preprocessing="hps_letterbox: tensor bicubic with antialiasing, long side 224, black bars",
    text_length=77,
    formula="<e_image, e_text>; P(a > b) = sigmoid(exp(logit_scale) * (a - b))",
    scale="cosine; the benchmark multiplies by 100",
    usual_range=(0.24, 0.29),
    licence="Apache-2.0",
    traps=(
        "Scores of different prompts are not comparable.",
        "The official function runs in fp16 on GPUs: its scores are quantised to 2.4e-4, with artificial ties.",
        "torchvision before 0.17 resized without antialiasing, which shifts scores; published tables mix both.",
        "ReNO and others feed a centre crop instead of the letterbox.",
    ),
    source="tgxs002/HPSv2 @866735ec",
)


class HPSv2(TwoTowerScorer):
    """Score by the cosine of an open_clip CLIP, without a scale."""

    is_scaled = False
    cards = (
        _HPSV2,
        dataclasses.replace(
            _HPSV2, name="hpsv2.1", weights="xswu/HPSv2/HPS_v2.1_compressed.pt", usual_range=(0.13, 0.34)
        ),
    )

    def __init__(
        self,
        card: ScorerCard,
        module: nn.Module,
        spec: PixelSpec,
        config: Mapping[str, Any],
        bpe_file: str | Path,
        *,
        source: str,
    ):
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__(card, module, spec, source=source)
        self.config = config  # open_clip's model_cfg
        self._is_plain = {*config["vision_cfg"], *config["text_cfg"]} <= SIZES
        self.bpe_file = Path(bpe_file)
        self.tokenizer = SimpleTokenizer(bpe_path=str(bpe_file), context_length=module.context_length)

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load the official .pt, a .safetensors of the same keys, or a folder with open_clip_config.json.

        Nothing else is downloaded; the official code first fetches a second ViT-H that it then overwrites.
        """
        folder, weights = _locate(card, path_or_id)
        config, spec = _read_config(folder / CONFIG_FILE) if folder else (OFFICIAL_MODEL, PixelSpec())
        if config.get("quick_gelu"):
            raise ScorerError(
                f"{folder / CONFIG_FILE}: quick_gelu = true, but HPSv2's network was trained with the exact GELU. "
                "Correct the config; a network of your own has to use the same activation."
            )
        state = read_state_dict(weights)  # before the network is built: a broken file is reported at once
        with skip_random_init():
            module = build_clip(config, source=str(folder or weights))
        load_strict(module, state, weights)
        has_own_vocabulary = folder is not None and (folder / BPE_FILE).is_file()
        bpe_file = folder / BPE_FILE if has_own_vocabulary else bundled_bpe_file()
        tokens = 512 + len(read_merges(bpe_file)) + 2
        if tokens > module.vocab_size:
            raise ScorerError(
                f"{path_or_id}: the vocabulary {bpe_file} has {tokens} tokens, the network knows {module.vocab_size}. "
                f"Put the vocabulary the network was trained with beside {CONFIG_FILE} as {BPE_FILE}."
            )
        logit_scale = module.logit_scale.detach().clone()
        module.to(dtype).logit_scale.data = logit_scale  # bf16 would round 100 to 98.9
        return cls(card, module, spec, config, bpe_file, source=path_or_id)

    @property
    def text_length(self) -> int:
        """Return the number of tokens a prompt is cut to, start and end token included."""
        return self.module.context_length

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has before it is cut, start and end token included."""
        return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]

    @property
    def recipe(self) -> Recipe:
        """Return how the official transform makes pixels [3, size, size]."""
        return Recipe("hps_letterbox", self.spec)

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return pixels [N, 3, size, size]; the official transform is differentiable itself."""
        return hps_letterbox(images, self.spec)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [N, context_length], padded with 0."""
        return self.tokenizer(list(prompts))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return image embeddings [N, D], not normalised."""
        tower = self.module.visual
        if not (self._is_plain and towers.is_usable(tower, pixels)):
            return self.module.encode_image(pixels)
        x = towers.embed_patches(pixels, tower.conv1, tower.class_embedding, tower.positional_embedding)
        first, blocks = torch.zeros(len(x), dtype=torch.long), towers.open_clip_blocks(tower.transformer.resblocks)
        return tower.ln_post(towers.run(blocks, tower.ln_pre(x), first, causal=False)) @ tower.proj

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return text embeddings [N, D], not normalised."""
        model = self.module
        if not (self._is_plain and towers.is_usable(model.transformer, tokens)):
            return model.encode_text(tokens)
        read = tokens.argmax(dim=-1)  # the end token has the largest id
        x = towers.embed_words(tokens, read, model.token_embedding.weight, model.positional_embedding)
        x = towers.run(towers.open_clip_blocks(model.transformer.resblocks), x, read, causal=True)
        return model.ln_final(x) @ model.text_projection

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image tower's parameters: embeddings, each block (the last with its norm), projection."""
        tower = self.module.visual
        *blocks, last = (list(block.parameters()) for block in tower.transformer.resblocks)
        stem = [tower.conv1.weight, tower.class_embedding, tower.positional_embedding, *tower.ln_pre.parameters()]
        return [stem, *blocks, [*last, *tower.ln_post.parameters()], [tower.proj]]

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text tower's parameters: embeddings, each block."""
        stem = [self.module.token_embedding.weight, self.module.positional_embedding]
        return [stem, *(list(block.parameters()) for block in self.module.transformer.resblocks)]

    def save(self, directory: str | Path) -> Path:
        """Write the folder open_clip reads as `local-dir:`, and a vocabulary that is not the official one."""
        return write_folder(directory, self._write)

    def save_official(self, file: str | Path) -> Path:
        """Write one .pt in the layout of the official releases: open_clip's keys under "state_dict"."""
        file = Path(file)
        state = {key: value.detach().cpu() for key, value in self.module.state_dict().items()}
        write_folder(file.parent, lambda folder: torch.save({"state_dict": state}, folder / file.name))
        return file

    def _write(self, folder: Path) -> None:
        config = {"model_cfg": self.config, "preprocess_cfg": {"mean": self.spec.mean, "std": self.spec.std}}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_safetensors(self.module.state_dict(), folder / WEIGHT_FILES[0])
        if self.bpe_file != bundled_bpe_file():
            shutil.copyfile(self.bpe_file, folder / BPE_FILE)


def build_clip(config: Mapping[str, Any], *, source: str) -> nn.Module:
    """Build open_clip's CLIP from a model_cfg; raise ScorerError for towers of other libraries."""
    import open_clip

    text, vision = config.get("text_cfg", {}), config.get("vision_cfg", {})
    foreign = [key for key in ("hf_model_name", "hf_tokenizer_name", "timm_model_name") if {**text, **vision}.get(key)]
    if config.get("custom_text") or foreign:
        raise ScorerError(f"{source}: {', '.join(foreign) or 'custom_text'} is not supported, HPSv2 is a plain CLIP.")
    try:
        return open_clip.CLIP(**config)
    except TypeError as error:
        raise ScorerError(f"{source}: model_cfg does not describe an open_clip CLIP ({error}).") from None


def _locate(card: ScorerCard, path_or_id: str) -> tuple[Path | None, Path]:
    """Return the folder with the config, None for a lone weights file, and the weights file."""
    path, official_file = Path(path_or_id), card.weights.rsplit("/", 1)[-1]
    if is_hub_id(path_or_id):
        owner, name, *file = path_or_id.split("/")
        path = from_hub(f"{owner}/{name}", file=file[0] if file else official_file)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return path, first_existing(path, WEIGHT_FILES)
        # a folder of official downloads may hold both versions: only the one asked for will do
        return None, first_existing(path, [official_file])
    if not path.is_file():
        raise ScorerError(f"There is no file or folder {path}. Give {official_file} or an open_clip folder.")
    return (path.parent if (path.parent / CONFIG_FILE).is_file() else None), path


def _read_config(file: Path) -> tuple[dict[str, Any], PixelSpec]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model_cfg"]
        size = model["vision_cfg"]["image_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScorerError(
            f"Cannot read {file} ({error!r}). Expected open_clip's model_cfg with vision_cfg.image_size."
        ) from None
    pixels = content.get("preprocess_cfg", {})
    official = PixelSpec()
    mean, std = pixels.get("mean", official.mean), pixels.get("std", official.std)
    return model, PixelSpec(size=size, mean=tuple(mean), std=tuple(std))
