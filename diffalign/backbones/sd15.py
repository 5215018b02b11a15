"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, no micro-conditioning."""

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.unet import UNetBackbone


class SD15(UNetBackbone):
    """Adapt StableDiffusionPipeline checkpoints (SD1.4, SD1.5, SD2.0, SD2.1 and their fine-tunes)."""

    family = "sd15"
    pipeline_class = StableDiffusionPipeline
    text_columns = ("prompt_embeds",)

    def _encode_tokens(self, tokens: Sequence[Any]) -> dict[str, Tensor]:
        """Return the last hidden states [N,L,D] of the text encoder, in its dtype."""
        encoder = self.text_encoders[0]
        read = tokens[0].to(encoder.device)
        mask = read.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return {"prompt_embeds": encoder(read.input_ids, attention_mask=mask)[0]}

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return the UNet's prediction [N,C,h,w] in its dtype."""
        dtype = self._dtype(denoiser)
        text = self._text(denoiser, cond).to(dtype)
        return denoiser(xt.to(dtype), timesteps, encoder_hidden_states=text, return_dict=False)[0]

    def pipeline(self) -> StableDiffusionPipeline:
        """Return a StableDiffusionPipeline over these modules, safety checker off."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.denoiser,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
