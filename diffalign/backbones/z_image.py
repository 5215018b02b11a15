"""Z-Image: Qwen3 as the text encoder, and one stream of text and picture tokens (2511.22699)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from diffalign.backbones.adapters import ATTENTION
from diffalign.backbones.chats import chats
from diffalign.backbones.conditioning import MASK, Conditioning
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.layer_names import LayerNames, fused, same, under
from diffalign.backbones.transformer import about_tokens
from diffalign.errors import ModelError

TEXT_LENGTH = 512  # tokens, the pipeline's `max_sequence_length`
CHAT_TOKENS = 8  # of the chat template around a prompt
PATCH = 2  # the pipeline never asks for another `patch_size`
_BLOCK = {
    "attention.qkv": fused("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
ORIGINAL = LayerNames(
    (
        *(
            rename
            for blocks in ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")
            for rename in under(blocks, blocks, _BLOCK)
        ),
        *under(
            "",
            "",
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            },
        ),
        *same("", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    ),
    network_module="networks.lora_zimage",
    comfy_original=False,  # ComfyUI knows both; diffusers reads only its own names there
)


class ZImage(FlowBackbone):
    """Adapt ZImagePipeline checkpoints: Z-Image (not Turbo, which draws in a few steps) and its fine-tunes.

    The network takes lists of pictures and of texts of unequal lengths; here texts are padded with zeros, and a mask
    says which tokens are the prompt's.
    """

    family = "zimage"
    hub_mark = "Z-Image"
    file_marks = ("x_pad_token",)
    pipeline_class, denoiser_class = ZImagePipeline, ZImageTransformer2DModel
    required = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"})
    encoder_classes = (Qwen3Model, Qwen3ForCausalLM)
    tokenizer_classes = (Qwen2Tokenizer,)
    text_columns = ("prompt_embeds", MASK)
    repeated_blocks = ("ZImageTransformerBlock",)
    prompt_first = True
    token_columns, padded_length, ignores_padding = text_columns, TEXT_LENGTH, True
    noise_dtype = torch.float32
    cuts_text = True
    lora_targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    original_names = ORIGINAL

    @classmethod
    def patch_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the side of the patches that become tokens."""
        return PATCH

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the padded tokens and of their mask."""
        return TEXT_LENGTH * (denoiser_config["cap_feat_dim"] + 1)

    @classmethod
    def prompt_tokens(cls, tokenizers: Sequence[Any], prompts: list[str]) -> int:
        """Return how many tokens the chats about prompts are, about as many without Qwen3's tokenizer."""
        if not tokenizers:
            return about_tokens(prompts, CHAT_TOKENS, TEXT_LENGTH)
        tokens = tokenizers[0](chats(tokenizers[0], prompts, thinking=True), max_length=TEXT_LENGTH, truncation=True)
        return sum(map(len, tokens.input_ids))

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return Qwen3 and the chats about prompts; see Backbone."""
        return tokenizers[0], chats(tokenizers[0], prompts, thinking=True), TEXT_LENGTH

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse what the flow families refuse, networks that look at pictures, and pictures beyond the positions."""
        super().check_trainable(source, denoiser, vae, resolution)
        if denoiser.get("siglip_feat_dim") is not None:
            raise ModelError(
                f'The transformer of "{source}" looks at pictures too (siglip_feat_dim). Edit and omni checkpoints '
                "cannot be trained here: use the text-to-image model."
            )
        cls._check_positions(source, cls._largest(denoiser, vae), resolution)

    @property
    def native_resolution(self) -> int:
        """Return the pipeline's 1024 pixels, or as many as there are positions for."""
        return min(1024, self._largest(self.denoiser.config, self.vae.config))

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return Qwen3's last but one hidden states [N,512,D] of the chat about each prompt, zeros where none is."""
        tokenizer, encoder = self.tokenizers[0], self.text_encoders[0]
        tokens = self._tokenize(tokenizer, chats(tokenizer, prompts, thinking=True), TEXT_LENGTH).to(encoder.device)
        mask = tokens.attention_mask.bool()
        output = encoder(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True)
        return {"prompt_embeds": output.hidden_states[-2].masked_fill(~mask[..., None], 0.0), MASK: mask}

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; the network returns -v, and counts time from 0 (noise) to 1."""
        dtype = self._dtype(denoiser)
        texts = zip(cond["prompt_embeds"].to(dtype), cond[MASK], strict=True)
        output = denoiser(
            list(xt.to(dtype).unsqueeze(2)),  # a picture is a film of one frame
            (1000 - timesteps) / 1000,
            [text[kept] for text, kept in texts],
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)

    @classmethod
    def _largest(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
        """Return the side of the largest pictures whose every token has a position of its own, in pixels."""
        return min(denoiser["axes_lens"][1:]) * PATCH * cls.scale_factor_of(vae)
