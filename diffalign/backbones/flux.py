"""FLUX.1: CLIP's pooled embedding, T5, and a guidance-distilled transformer over packed latents and text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from diffalign.backbones import packing
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.layer_names import LayerNames, fused, turned, under
from diffalign.errors import ModelError

NATIVE_LATENTS = 128  # the pipeline's `default_sample_size`
T5_LENGTH = 512  # tokens, the pipeline's `max_sequence_length`
ORIGINAL = LayerNames(
    (
        *under(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "img_attn.qkv": fused("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "img_mod.lin": "norm1.linear",
                "txt_attn.qkv": fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
                "txt_mod.lin": "norm1_context.linear",
            },
        ),
        *under(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            {
                "linear1": fused("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", shares=(1, 1, 1, 4)),
                "linear2": "proj_out",
                "modulation.lin": "norm.linear",
            },
        ),
        *under(
            "",
            "",
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
                "final_layer.linear": "proj_out",
                "final_layer.adaLN_modulation.1": turned("norm_out.linear"),
            },
        ),
    ),
    network_module="networks.lora_flux",
)


class Flux(FlowBackbone):
    """Adapt FluxPipeline checkpoints: FLUX.1-dev, FLUX.1-Krea-dev and their fine-tunes."""

    family = "flux"
    hub_mark = "FLUX.1"
    file_marks = ("vector_in.", "double_blocks.0.img_mod.", "single_transformer_blocks.0.norm.")
    pipeline_class, denoiser_class = FluxPipeline, FluxTransformer2DModel
    required = frozenset(
        {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    )
    encoder_classes = (CLIPTextModel, T5EncoderModel)
    tokenizer_classes = (CLIPTokenizer, T5Tokenizer)
    text_columns = ("prompt_embeds", "pooled_prompt_embeds")
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    # Ends of names: the attention of all blocks; `proj_mlp` and `proj_out` are of the single blocks, where the latter
    # is the output of attention and MLP at once.
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("proj_mlp", "proj_out"),
    )
    original_names = ORIGINAL
    packing_side = packing.SIDE

    @property
    def native_resolution(self) -> int:
        """Return how many pixels the pipeline draws, high and wide, unless it is told: no configuration says it."""
        return NATIVE_LATENTS * self.vae_scale_factor

    @classmethod
    def idle_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return the last projection, to the latents: `proj_out` among the targets means those of single blocks.

        All else is read: the single blocks pass text and picture through the same layers.
        """
        return ("proj_out",)

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of T5's tokens and of CLIP's pooled embedding."""
        return T5_LENGTH * denoiser_config["joint_attention_dim"] + denoiser_config["pooled_projection_dim"]

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse FLUX.1-schnell under other names: it is told no guidance, and its scheduler shifts nothing."""
        shifted = scheduler.get("use_dynamic_shifting") or scheduler.get("shift", 1.0) != 1.0
        if not denoiser.get("guidance_embeds") and not shifted:
            raise ModelError(
                f'"{source}" has no guidance embedding and a scheduler without a shift, as FLUX.1-schnell has, which '
                "is distilled to draw in a few steps. Learning from given pictures by flow matching would undo that. "
                "Train FLUX.1-dev and put the LoRA on this one when drawing. If it was trained back to many steps, "
                "give it FLUX.1-dev's scheduler_config.json."
            )

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return T5, of CLIP only the pooled output counts; see Backbone."""
        return tokenizers[1], prompts, T5_LENGTH

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return T5's last hidden states [N,512,D] and CLIP's pooled output [N,P]; padding is not masked."""
        clip, t5 = self.text_encoders
        tokens = [self._tokenize(self.tokenizers[0], prompts), self._tokenize(self.tokenizers[1], prompts, T5_LENGTH)]
        return {
            "prompt_embeds": t5(tokens[1].input_ids.to(t5.device))[0],
            "pooled_prompt_embeds": clip(tokens[0].input_ids.to(clip.device)).pooler_output,
        }

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; it takes tokens, times from 0 to 1 and `guidance`."""
        dtype, (height, width) = self._dtype(denoiser), xt.shape[-2:]
        text = cond["prompt_embeds"].to(dtype)
        tokens = denoiser(
            hidden_states=packing.packed(xt.to(dtype)),
            timestep=timesteps / 1000,
            guidance=self._told_guidance(xt),
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=xt.device),
            img_ids=packing.image_ids(height, width, xt.device),
            return_dict=False,
        )[0]
        return packing.unpacked(tokens, height, width)

    def pipeline(self) -> FluxPipeline:
        """Return a FluxPipeline over these modules."""
        return FluxPipeline(
            transformer=self.denoiser,
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
