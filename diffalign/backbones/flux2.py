"""FLUX.2: hidden states of a language model as text, latents normalised by token, packed into one stream with it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Mistral3ForConditionalGeneration,
    PixtralProcessor,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)

from diffalign.backbones import packing
from diffalign.backbones.chats import chats
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.layer_names import LayerNames, fused, turned, under

NATIVE_LATENTS = 128  # the pipelines' `default_sample_size`
TEXT_LENGTH = 512  # tokens, the pipelines' `max_sequence_length`
QWEN_LAYERS = (9, 18, 27)  # the pipelines' `text_encoder_out_layers`: 0 are the embeddings
MISTRAL_LAYERS = (10, 20, 30)
ORIGINAL = LayerNames(
    (
        *under(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            {
                "img_attn.qkv": fused("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_attn.qkv": fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        *under(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        ),
        *under(
            "",
            "",
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
                "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
                "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
                "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
                "single_stream_modulation.lin": "single_stream_modulation.linear",
                "final_layer.linear": "proj_out",
                "final_layer.adaLN_modulation.1": turned("norm_out.linear"),
            },
        ),
    ),
    network_module="networks.lora_flux_2",
    comfy_alpha=False,  # diffusers refuses it there
)


class Flux2(FlowBackbone):
    """Adapt Flux2KleinPipeline checkpoints (FLUX.2-klein-base-4B and -9B) and those of Flux2Pipeline (FLUX.2-dev).

    Latents are 32 channels of 8 x 8 pixels, normalised; the 128 channels of the network are tokens of 2 x 2 of them.
    """

    family = "flux2"
    hub_mark = "FLUX.2"
    file_marks = ("double_stream_modulation_img.",)
    pipeline_class, other_pipelines = Flux2KleinPipeline, (Flux2Pipeline,)
    denoiser_class, vae_class = Flux2Transformer2DModel, AutoencoderKLFlux2
    required = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"})
    encoder_classes = (Qwen3ForCausalLM, Mistral3ForConditionalGeneration)
    tokenizer_classes = (Qwen2Tokenizer, PixtralProcessor)
    text_columns = ("prompt_embeds",)
    repeated_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    # Ends of names. Attention and feed-forward layers of the blocks of two streams; in those of one both are a single
    # layer in and a single layer out, whose name `to_out` is that of a list of layers in the others.
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("to_qkv_mlp_proj", "to_out"),
    )
    original_names = ORIGINAL
    packing_side = noise_patches = packing.SIDE
    mu_rule = "flux2"
    few_steps = re.compile(rf"{FlowBackbone.few_steps.pattern}|^FLUX\.2-klein-\d+B", re.IGNORECASE)  # not klein-base

    @property
    def own_pipeline(self) -> type[Flux2KleinPipeline | Flux2Pipeline]:
        """Return klein's pipeline where Qwen3 reads the text, and dev's where Mistral3 does."""
        return Flux2KleinPipeline if self._is_klein else Flux2Pipeline

    @property
    def native_resolution(self) -> int:
        """Return how many pixels the pipelines draw, high and wide, unless they are told: no configuration says it."""
        return NATIVE_LATENTS * self.vae_scale_factor

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the tokens."""
        return TEXT_LENGTH * denoiser_config["joint_attention_dim"]

    @classmethod
    def check_index(cls, source: str, index: Mapping[str, Any]) -> None:
        """Refuse klein after its distillation, which its pipeline is told of."""
        if index.get("is_distilled"):
            raise cls._is_distilled(source, "is_distilled in its model_index.json")

    @classmethod
    def guidance_arguments(cls, pipeline: Any, scale: float, negative_prompt: str, number: int) -> dict[str, Any]:
        """Return the scale, and of a negative prompt the embeddings: klein's pipeline takes no other."""
        if not negative_prompt:
            return {"guidance_scale": scale}
        embeds = pipeline.encode_prompt([negative_prompt] * number)[0]
        return {"guidance_scale": scale, "negative_prompt_embeds": embeds}

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return hidden states [N,512,3D] of three layers of the language model; padding is not masked afterwards."""
        encoder = self.text_encoders[0]
        layers = QWEN_LAYERS if self._is_klein else MISTRAL_LAYERS
        tokens = self._tokens(prompts).to(encoder.device)
        states = encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # none is asked for, and those of all tokens would be gigabytes
        ).hidden_states
        return {"prompt_embeds": torch.cat([states[layer] for layer in layers], dim=-1)}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std [N,32,h,w] float32 of the latents, normalised by the channels of their tokens."""
        (mean, std), (centre, spread) = super().encode_images(images), self._statistics()
        size = mean.shape[2:]
        mean = packing.unpacked((packing.packed(mean) - centre) / spread, *size)
        return mean, packing.unpacked(packing.packed(std) / spread, *size)

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Return images [N,3,H,W] float32 in [0,1] of normalised latents `x0` [N,32,h,w]; differentiable in `x0`."""
        centre, spread = (part.to(x0.device) for part in self._statistics())
        return super().decode_latents(packing.unpacked(packing.packed(x0) * spread + centre, *x0.shape[2:]))

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; it takes tokens, times from 0 to 1 and, of dev, `guidance`."""
        dtype, (height, width) = self._dtype(denoiser), xt.shape[-2:]
        text = cond["prompt_embeds"].to(dtype)
        places = torch.arange(text.shape[1], device=xt.device)[:, None]
        tokens = denoiser(
            hidden_states=packing.packed(xt.to(dtype)),
            encoder_hidden_states=text,
            timestep=timesteps / 1000,
            img_ids=F.pad(packing.image_ids(height, width, xt.device), (0, 1)),  # 0, row, column, 0
            txt_ids=F.pad(places, (3, 0)),  # 0, 0, 0, token
            guidance=self._told_guidance(xt),
            return_dict=False,
        )[0]
        return packing.unpacked(tokens, height, width)

    def _pipeline_options(self) -> dict[str, Any]:
        return {"is_distilled": self.options.get("is_distilled", False)} if self._is_klein else {}

    @property
    def _is_klein(self) -> bool:
        return isinstance(self.text_encoders[0], Qwen3ForCausalLM)

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return the language model's tokenizer and the chats about prompts; see Backbone."""
        tokenizer = tokenizers[0]
        if not isinstance(tokenizer, ProcessorMixin):
            return tokenizer, chats(tokenizer, prompts, thinking=False), TEXT_LENGTH
        told = [_told(prompt) for prompt in prompts]
        texts = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=False)
        return tokenizer.tokenizer, texts, TEXT_LENGTH

    def _tokens(self, prompts: list[str]) -> Any:
        words, texts, length = self.read_texts(self.tokenizers, prompts)
        begun = not self._is_klein and words.bos_token is not None and texts[0].startswith(words.bos_token)
        return self._tokenize(words, texts, length, marked=begun)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std [4C] float32 of the channels of tokens, which the VAE keeps as those of a batch norm."""
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        return norm.running_mean.float(), (norm.running_var.float() + eps).sqrt()

    def _shift_and_scale(self) -> tuple[float, float]:
        return 0.0, 1.0  # of latents before they are tokens


def _told(prompt: str) -> list[dict[str, Any]]:
    """Return the chat about a prompt that FLUX.2-dev was trained with; the mark of a picture would be taken for one."""
    messages = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages.items()]
