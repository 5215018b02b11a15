"""What the families with a UNet share: DDPM's noise schedule, and text that several images may share."""

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffalign.backbones import published
from diffalign.backbones.attention import shares_text
from diffalign.backbones.base import CLIP_LENGTH, Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.ddpm import check_ddpm
from diffalign.backbones.kohya import unet_names
from diffalign.backbones.layer_names import LayerNames
from diffalign.denoising.paths import DDPMPath
from diffalign.errors import ModelError


class UNetBackbone(Backbone):
    """Adapt what is made of a UNet2DConditionModel, an AutoencoderKL and CLIP text encoders."""

    denoiser_class, denoiser_name = UNet2DConditionModel, "unet"
    file_marks = ("input_blocks.", "down_blocks.")
    required = frozenset({"unet", "vae", "text_encoder", "tokenizer", "scheduler"})
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    plain_attention = True

    @classmethod
    def layer_names(cls, denoiser: nn.Module | None = None) -> LayerNames:
        """Return what kohya's files call the layers of `denoiser`, of the published UNet when None."""
        return unet_names(published.random_unet(cls.family, device="meta") if denoiser is None else denoiser)

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of 77 tokens and of SDXL's pooled embedding."""
        pooled = 0
        if denoiser_config["addition_embed_type"] == "text_time":
            time_ids = 6 * denoiser_config["addition_time_embed_dim"]
            pooled = denoiser_config["projection_class_embeddings_input_dim"] - time_ids
        return CLIP_LENGTH * denoiser_config["cross_attention_dim"] + pooled

    def _noise_path(self) -> DDPMPath:
        return DDPMPath.from_config(self.scheduler.config)

    def _check_parts(self) -> None:
        channels = self.denoiser.config.in_channels
        if channels != self.latent_channels:
            raise ModelError(
                f'The UNet of "{self.source}" takes {channels} channels, the VAE makes {self.latent_channels}. '
                "Inpainting, depth and edit checkpoints cannot be trained here: use the text-to-image model."
            )
        check_ddpm(self, "Use an SD1.5, SD2.1 or SDXL model.")

    @staticmethod
    def _text(denoiser: nn.Module, cond: Conditioning) -> Tensor:
        """Return the embeddings as `denoiser` takes them: of N entries, or shared ones once (`share_text`)."""
        return cond.columns["prompt_embeds"] if shares_text(denoiser) else cond["prompt_embeds"]
