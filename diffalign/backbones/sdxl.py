"""Stable Diffusion XL: two CLIP text encoders and size micro-conditioning (Podell et al. 2023, arXiv:2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.unet import UNetBackbone
from diffalign.errors import ModelError


class SDXL(UNetBackbone):
    """Adapt StableDiffusionXLPipeline checkpoints (SDXL base and its fine-tunes; not the refiner)."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    text_columns = ("prompt_embeds", "pooled_prompt_embeds")

    def _encode_tokens(self, tokens: Sequence[Any]) -> dict[str, Tensor]:
        """Return both encoders' penultimate hidden states side by side [N,L,D1+D2] and the second's projection [N,P].

        The pipeline replaces the embeddings of a missing negative prompt by zeros; here "" is encoded like any text.
        """
        hidden_states = []
        for read, encoder in zip(tokens, self.text_encoders, strict=True):
            output = encoder(read.input_ids.to(encoder.device), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        return {"prompt_embeds": torch.cat(hidden_states, dim=-1), "pooled_prompt_embeds": output.text_embeds}

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor | None) -> Conditioning:
        """Add `sizes` [N,6] to the text: the time ids in the order of the pipeline's `_get_add_time_ids`.

        Raises:
            ModelError: a column of text is missing or `sizes` is not [N,6].
        """
        cond = super().condition(text, sizes)
        if sizes is None or sizes.shape != (len(cond), 6):
            shape = None if sizes is None else list(sizes.shape)
            raise ModelError(
                f"SDXL needs sizes of shape [{len(cond)},6] (original height, width, crop top, left, "
                f"target height, width), got {shape}."
            )
        return Conditioning({**cond.columns, "add_time_ids": sizes.float()})

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return the UNet's prediction [N,C,h,w] in its dtype."""
        dtype = self._dtype(denoiser)
        added = {"text_embeds": cond["pooled_prompt_embeds"].to(dtype), "time_ids": cond["add_time_ids"]}
        return denoiser(
            xt.to(dtype),
            timesteps,
            encoder_hidden_states=self._text(denoiser, cond).to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def pipeline(self) -> StableDiffusionXLPipeline:
        """Return a StableDiffusionXLPipeline over these modules, without a watermark."""
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            unet=self.denoiser,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            force_zeros_for_empty_prompt=self.options.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,
        )

    def _check_parts(self) -> None:
        super()._check_parts()
        if len(self.text_encoders) != 2:
            raise ModelError(
                f'"{self.source}" has {len(self.text_encoders)} text encoder(s), SDXL base has 2. '
                "The SDXL refiner cannot be trained here: use the base model."
            )
