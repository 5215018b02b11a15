"""SANA: linear attention over latents of 1/32, and Gemma2 told to enhance the prompt (2410.10629, 2501.18427)."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from diffalign.backbones.conditioning import MASK, Conditioning
from diffalign.backbones.gemma import GemmaBackbone
from diffalign.errors import ModelError

# What comes before every prompt but the one that is guided away from; the pipeline has it as a default argument.
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


class Sana(GemmaBackbone):
    """Adapt SanaPipeline checkpoints: SANA and SANA-1.5 (not Sprint, which draws in a few steps).

    The VAE's encoder is deterministic: pictures have a mean and no deviation.
    """

    family = "sana"
    hub_mark = "/Sana"
    pipeline_class, denoiser_class = SanaPipeline, SanaTransformer2DModel
    vae_class = AutoencoderDC
    repeated_blocks = ("SanaTransformerBlock",)
    padded_length = 300
    noise_dtype = torch.float32  # in half precision, too
    instruction = INSTRUCTION

    @classmethod
    def _left_out(cls, instruction_tokens: int) -> int:
        return instruction_tokens - 2  # the first and the last stay

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the padded tokens and of their mask."""
        return cls.padded_length * (denoiser_config["caption_channels"] + 1)

    @classmethod
    def drawing_options(cls, pipeline: SanaPipeline) -> dict[str, Any]:
        """Return what keeps the pipeline from drawing at a resolution of its own and resizing what comes out."""
        return {"use_resolution_binning": False}

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse SANA-Sprint under other names: it is told the guidance, and its noise follows another path."""
        if denoiser.get("guidance_embeds") or scheduler.get("prediction_type") == "trigflow":
            raise ModelError(
                f'"{source}" has a guidance embedding or a trigflow scheduler, as SANA-Sprint has, which is distilled '
                "to draw in a few steps. Learning from given pictures by flow matching would undo that. Train SANA."
            )

    @staticmethod
    def scale_factor_of(vae_config: Mapping[str, Any]) -> int:
        """Return how many pixels a latent of the VAE is high and wide."""
        return 2 ** (len(vae_config["encoder_block_out_channels"]) - 1)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return Gemma2's last hidden states [N,300,D] of each prompt behind the instruction, zeros where none is.

        They begin with that of the first token, and with that of the instruction's last.
        """
        told = len(self.tokenizers[0].encode(INSTRUCTION))
        texts = [INSTRUCTION + prompt.lower().strip() for prompt in prompts]
        output, mask = self._read(texts, told + self.padded_length - 2)
        kept = [0, *range(1 - self.padded_length, 0)]
        return self._columns(output.last_hidden_state[:, kept], mask[:, kept])

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; it takes timesteps from 0 to 1000, scaled as it is configured."""
        dtype = self._dtype(denoiser)
        return denoiser(
            xt.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond[MASK],
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]

    def _encode(self, vae: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean = vae.encode(pictures).latent
        return mean, torch.zeros_like(mean)
