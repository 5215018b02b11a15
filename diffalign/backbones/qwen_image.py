"""Qwen-Image: Qwen2.5-VL as the text encoder, a VAE of films, a transformer of two streams (2508.02324)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffalign.backbones import packing
from diffalign.backbones.conditioning import MASK, Conditioning
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.layer_names import LayerNames, same
from diffalign.backbones.transformer import about_tokens
from diffalign.errors import ModelError

NATIVE_LATENTS = 128  # the pipeline's `default_sample_size`
TEXT_LENGTH = 512  # tokens, the pipeline's `max_sequence_length`
# The pipeline's `prompt_template_encode`, and how many of its tokens come before the prompt and are dropped.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34
AFTER_PROMPT = 5  # tokens of the template
NO_PROMPT = " "  # what its makers guide away from where there is no negative prompt
GIVEN_PICTURES = re.compile(r"edit|layered|inpaint|control", re.IGNORECASE)  # of names
# Settings of transformers that no published text-to-image checkpoint has, and what they are of.
FOREIGN = {
    "zero_cond_t": "that of an edit checkpoint, which is given a picture",
    "use_layer3d_rope": "that of Qwen-Image-Layered, which is given a picture",
    "use_additional_t_cond": "that of Qwen-Image-Layered, which is given a picture",
    "guidance_embeds": "guidance-distilled, which diffusers cannot evaluate",
}
ORIGINAL = LayerNames(
    (
        *same(
            "transformer_blocks.{}.",
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
            *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
        ),
        *same("", "img_in", "txt_in", "proj_out", "norm_out.linear"),
        *same("time_text_embed.timestep_embedder.", "linear_1", "linear_2"),
    ),
    network_module="networks.lora_qwen_image",
)


class QwenImage(FlowBackbone):
    """Adapt QwenImagePipeline checkpoints: Qwen-Image, Qwen-Image-2512 and their fine-tunes.

    To its VAE a picture is a film of one frame; latents are normalised channel by channel. Texts are padded with zeros
    to TEXT_LENGTH and have a mask; the network is given no more tokens than the longest prompt of a batch has.
    """

    family = "qwen"
    hub_mark = "Qwen-Image"
    file_marks = ("transformer_blocks.0.img_mod.",)
    pipeline_class, denoiser_class = QwenImagePipeline, QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    required = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"})
    encoder_classes = (Qwen2_5_VLForConditionalGeneration,)
    tokenizer_classes = (Qwen2Tokenizer,)
    text_columns = ("prompt_embeds", MASK)
    token_columns, padded_length, ignores_padding = text_columns, TEXT_LENGTH, True
    repeated_blocks = ("QwenImageTransformerBlock",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    original_names = ORIGINAL
    packing_side = packing.SIDE
    separate_branches = True
    cuts_text = True

    @property
    def native_resolution(self) -> int:
        """Return how many pixels the pipeline draws, high and wide, unless it is told: no configuration says it."""
        return NATIVE_LATENTS * self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        """Return C of the latents."""
        return self.vae.config.z_dim

    @staticmethod
    def scale_factor_of(vae_config: Mapping[str, Any]) -> int:
        """Return how many pixels a latent of the VAE is high and wide."""
        return 2 ** len(vae_config["temperal_downsample"])

    @classmethod
    def patch_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the side of the packed latents: the transformer's own `patch_size` says nothing else."""
        return cls.packing_side

    @classmethod
    def unread_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return what the last block makes of the text after attention."""
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        return tuple(f"{last}.{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"))

    @classmethod
    def idle_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return these and the queries of the last block's text, whose answers nothing reads."""
        return (
            f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}.attn.add_q_proj",
            *cls.unread_layers(denoiser),
        )

    @classmethod
    def prompt_tokens(cls, tokenizers: Sequence[Any], prompts: list[str]) -> int:
        """Return how many tokens the template around prompts is after what is dropped of it; see Backbone."""
        if not tokenizers:
            return about_tokens(prompts, AFTER_PROMPT, TEXT_LENGTH)
        texts = [TEMPLATE.format(prompt) for prompt in prompts]
        tokens = tokenizers[0](texts, max_length=DROPPED + TEXT_LENGTH, truncation=True).input_ids
        return sum(len(ids) - DROPPED for ids in tokens)

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return Qwen2.5-VL and the template around prompts; see Backbone."""
        return tokenizers[0], [TEMPLATE.format(prompt) for prompt in prompts], DROPPED + TEXT_LENGTH

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the padded tokens and of their mask."""
        return TEXT_LENGTH * (denoiser_config["joint_attention_dim"] + 1)

    @classmethod
    def guidance_arguments(cls, pipeline: Any, scale: float, negative_prompt: str, number: int) -> dict[str, Any]:
        """Return what drives true guidance: the pipeline's `guidance_scale` is for distilled networks."""
        prompts = [negative_prompt or NO_PROMPT] * number
        return {"true_cfg_scale": scale, "negative_prompt": prompts if scale > 1 else None}

    @classmethod
    def check_name(cls, source: str) -> None:
        """Refuse few-step models, and those that are given a picture."""
        super().check_name(source)
        if GIVEN_PICTURES.search(source.rstrip("/").rsplit("/", 1)[-1]):
            raise ModelError(
                f'"{source}" is given a picture besides the prompt, and the pairs that are learnt from have none. '
                "Train the text-to-image model: Qwen/Qwen-Image or Qwen/Qwen-Image-2512."
            )

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse what the flow families refuse, and transformers that are not of text to image."""
        super().check_trainable(source, denoiser, vae, resolution)
        if found := next((name for name in FOREIGN if denoiser.get(name)), None):
            raise ModelError(
                f'The transformer of "{source}" ({found}) is {FOREIGN[found]}. Train the text-to-image model: '
                "Qwen/Qwen-Image or Qwen/Qwen-Image-2512."
            )

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse Qwen-Image-Lightning under other names: its scheduler shifts pictures of all sizes alike."""
        shifts = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        if scheduler.get("use_dynamic_shifting") and shifts[0] == shifts[1]:
            raise ModelError(
                f'The scheduler of "{source}" shifts pictures of all sizes alike (base_shift and max_shift are '
                f"{shifts[0]:.4g}), as Qwen-Image-Lightning's does, which is distilled to draw in a few steps. "
                "Learning from given pictures by flow matching would undo that. Train Qwen-Image and put the LoRA on "
                "this one when drawing. If it is no such model, give it Qwen-Image's scheduler_config.json."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return Qwen2.5-VL's last hidden states [N,512,D] of the template around each prompt, zeros where none is."""
        tokenizer, encoder = self.tokenizers[0], self.text_encoders[0]
        tokens = tokenizer(
            [TEMPLATE.format(prompt) for prompt in prompts],
            max_length=DROPPED + TEXT_LENGTH,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        # No logits are asked for but those of the last token: 150,000 a token are more than all else that is made.
        output = encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        masks = tokens.attention_mask.bool()
        texts = [text[mask][DROPPED:] for text, mask in zip(output.hidden_states[-1], masks, strict=True)]
        lengths = torch.tensor([len(text) for text in texts], device=encoder.device)
        return {
            "prompt_embeds": torch.stack([F.pad(text, (0, 0, 0, TEXT_LENGTH - len(text))) for text in texts]),
            MASK: torch.arange(TEXT_LENGTH, device=encoder.device) < lengths[:, None],
        }

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; it takes tokens, times from 0 to 1 and the text's mask."""
        dtype, (height, width) = self._dtype(denoiser), xt.shape[-2:]
        text, mask = _trimmed(cond["prompt_embeds"].to(dtype), cond[MASK])
        tokens = denoiser(
            hidden_states=packing.packed(xt.to(dtype)),
            timestep=timesteps / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // packing.SIDE, width // packing.SIDE)]] * len(xt),
            return_dict=False,
        )[0]
        return packing.unpacked(tokens, height, width)

    def _scaling(self) -> Any:
        return self.vae.config.latents_mean, self.vae.config.latents_std

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(numbers, device=self.vae.device).reshape(-1, 1, 1) for numbers in self._scaling())
        return mean, 1 / std

    def _encode(self, vae: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._encode(vae, pictures.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def _decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return super()._decode(vae, latents.unsqueeze(2)).squeeze(2)


def _trimmed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the text [N,L,D] without the padding that all prompts share, and its mask; None if no padding is left.

    As the pipeline does: attention has faster kernels without a mask, and 512 tokens are half of a picture of 512 px.
    """
    shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
    return text[:, :longest], None if shortest == longest else mask[:, :longest]
