"""The model of a run without its weights: its shapes, for estimates of memory and disk. Nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from torch import nn

from diffalign.backbones import adapters, loading, published, single_file
from diffalign.config import Config

TEXT_LENGTH = 77  # tokens, of CLIP's text encoders


@dataclass(frozen=True)
class MetaModel:
    """Hold what is known of a model before it is loaded."""

    denoiser: nn.Module  # on the meta device
    family: str
    origin: str  # in words, where the shapes are from
    vae_scale_factor: int = 8

    @property
    def text_width(self) -> int:
        """Return the numbers of a token's embedding."""
        return self.denoiser.config.cross_attention_dim

    @property
    def pooled_width(self) -> int:
        """Return the numbers of a prompt's pooled embedding, 0 where there is none."""
        shape = self.denoiser.config
        if shape.addition_embed_type != "text_time":
            return 0
        return shape.projection_class_embeddings_input_dim - 6 * shape.addition_time_embed_dim


def read(config: Config) -> MetaModel:
    """Return the model of a run.

    A hub model that is not in the local cache counts as the published SDXL base or SD1.5, by its name; a single file
    does so by the names of its tensors.

    Raises:
        ModelError: a path that does not exist, or a folder that is no pipeline of a supported family.
    """
    name, revision = loading.located(config.model.pretrained_model_name_or_path), config.model.revision
    if Path(name).is_dir():
        family = loading.PIPELINES[loading.read_index(name)["_class_name"]].family
        shape = Path(name) / "unet" / "config.json"
        return MetaModel(_on_meta(shape), family, "from its config", _scale_factor(Path(name) / "vae"))
    if Path(name).is_file():
        family = "sdxl" if single_file.family_of(Path(name)) == "sdxl" else "sd15"
        return MetaModel(published.random_unet(family, device="meta"), family, f"counted as the published {family}")
    family = published.MODELS.get(name) or ("sdxl" if "xl" in name.lower() else "sd15")
    cached = try_to_load_from_cache(name, "unet/config.json", revision=revision)
    if isinstance(cached, str):
        return MetaModel(_on_meta(Path(cached)), family, "from its config in the hub cache")
    origin = f"not read; counted as the published {family}"
    return MetaModel(published.random_unet(family, device="meta"), family, origin)


def count(config: Config, denoiser: nn.Module) -> tuple[int, int]:
    """Return how many parameters the denoiser has and how many of them, or of adapters added here, are trained."""
    total = sum(p.numel() for p in denoiser.parameters())
    if config.model.tune == "full":
        return total, total
    lora = config.lora
    trained = adapters.add_lora(denoiser, lora.rank, lora.lora_alpha, lora.lora_target_modules, blocks=lora.blocks)
    return total, sum(p.numel() for p in trained)


def _on_meta(file: Path) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(file))


def _scale_factor(folder: Path) -> int:
    """Return how many pixels a latent stands for in each direction; the published 8 where no VAE is."""
    if not (folder / "config.json").is_file():
        return 8
    return 2 ** (len(AutoencoderKL.load_config(folder)["block_out_channels"]) - 1)
