"""Lumina-Image 2.0: Gemma2 behind a system prompt, and one stream of text and picture tokens (2503.21758)."""

from collections.abc import Mapping
from typing import Any

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor, nn

from diffalign.backbones.adapters import ATTENTION
from diffalign.backbones.conditioning import MASK, Conditioning
from diffalign.backbones.gemma import GemmaBackbone
from diffalign.denoising.shifts import Shift

# The pipeline's `system_prompt`, and what it puts between that and a prompt.
INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
# What the pipeline gives to the rule of mu in the place of image tokens: the number of channels.
TOKENS_OF_MU = 16


class Lumina2(GemmaBackbone):
    """Adapt Lumina2Pipeline checkpoints: Lumina-Image 2.0 and its fine-tunes."""

    family = "lumina2"
    hub_mark = "Lumina-Image"
    pipeline_class, denoiser_class = Lumina2Pipeline, Lumina2Transformer2DModel
    older_pipelines = ("Lumina2Text2ImgPipeline",)
    repeated_blocks = ("Lumina2TransformerBlock",)
    lora_targets = (*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    separate_branches = True
    cuts_text = True
    padded_length = 256
    instruction = INSTRUCTION

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the padded tokens and of their mask."""
        return cls.padded_length * (denoiser_config["cap_feat_dim"] + 1)

    @classmethod
    def shift(cls, scheduler_config: Mapping[str, Any], tokens: int) -> Shift:
        """Return how the scheduler moves levels of noise: those of pictures of all sizes alike, as in the pipeline."""
        return super().shift(scheduler_config, TOKENS_OF_MU)

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse what the flow families refuse, and pictures beyond the table of positions."""
        super().check_trainable(source, denoiser, vae, resolution)
        token = cls.patch_size(denoiser) * cls.scale_factor_of(vae)
        cls._check_positions(source, min(denoiser["axes_lens"][1:]) * token, resolution)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return Gemma2's last but one hidden states [N,256,D] of each prompt behind the system's, zeros elsewhere."""
        texts = [INSTRUCTION + prompt for prompt in prompts]
        output, mask = self._read(texts, self.padded_length, output_hidden_states=True)
        return self._columns(output.hidden_states[-2], mask)

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; the network returns -v, and counts time from 0 (noise) to 1."""
        dtype = self._dtype(denoiser)
        return -denoiser(
            hidden_states=xt.to(dtype),
            timestep=1 - timesteps / 1000,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond[MASK],
            return_dict=False,
        )[0]
