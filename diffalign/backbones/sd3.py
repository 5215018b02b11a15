"""Stable Diffusion 3 and 3.5: two CLIP text encoders, T5, and a transformer over text and picture (2403.03206)."""

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from diffalign.backbones.base import CLIP_LENGTH
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.flow import FlowBackbone
from diffalign.backbones.layer_names import LayerNames, fused, turned, under
from diffalign.backbones.repeated_text import REPEATS, allow_repeats, repeats_text
from diffalign.errors import ModelError

logger = logging.getLogger(__name__)
T5_LENGTH = 256  # tokens, the pipeline's `max_sequence_length`
ORIGINAL = LayerNames(
    (
        *under(
            "joint_blocks.{}.x_block.",
            "transformer_blocks.{}.",
            {
                "attn.qkv": fused("attn.to_q", "attn.to_k", "attn.to_v"),
                "attn.proj": "attn.to_out.0",
                "attn2.qkv": fused("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "attn2.proj": "attn2.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "adaLN_modulation.1": "norm1.linear",
            },
        ),
        *under(
            "joint_blocks.{}.context_block.",
            "transformer_blocks.{}.",
            {
                "attn.qkv": fused("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "attn.proj": "attn.to_add_out",
                "mlp.fc1": "ff_context.net.0.proj",
                "mlp.fc2": "ff_context.net.2",
                "adaLN_modulation.1": turned("norm1_context.linear"),  # in the last block alone
            },
        ),
        *under(
            "",
            "",
            {
                "x_embedder.proj": "pos_embed.proj",
                "context_embedder": "context_embedder",
                "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
                "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
                "final_layer.adaLN_modulation.1": turned("norm_out.linear"),
            },
        ),
    ),
    network_module="networks.lora_sd3",
)


class SD3(FlowBackbone):
    """Adapt StableDiffusion3Pipeline checkpoints: SD3-medium, SD3.5-medium and SD3.5-large, and their fine-tunes.

    A pipeline without T5 is trained as it draws: with zeros in the place of T5's embeddings. One zero stands for all of
    them in what is encoded, cached and computed.
    """

    family = "sd3"
    hub_mark = "stable-diffusion-3"
    file_marks = ("joint_blocks.", "pos_embed.pos_embed")
    original_names = ORIGINAL
    pipeline_class, denoiser_class = StableDiffusion3Pipeline, SD3Transformer2DModel
    required = frozenset(
        {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    )
    encoder_classes = (CLIPTextModelWithProjection, T5EncoderModel)
    tokenizer_classes = (CLIPTokenizer, T5Tokenizer)
    text_columns = ("prompt_embeds", "pooled_prompt_embeds")
    repeated_blocks = ("JointTransformerBlock",)
    # Ends of names: `attn` of all blocks, and `attn2`, which the first blocks of SD3.5-medium have beside it.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def __init__(self, **parts: Any):
        """Take over the parts of a loaded pipeline; see Backbone."""
        super().__init__(**parts)
        if self._lacks_t5:
            allow_repeats(self.denoiser)

    @classmethod
    def idle_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return the queries of the last block's text, whose answers nothing reads."""
        return (f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}.attn.add_q_proj",)

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of the tokens of CLIP and T5 and of the pooled embedding."""
        tokens = CLIP_LENGTH + T5_LENGTH
        return tokens * denoiser_config["joint_attention_dim"] + denoiser_config["pooled_projection_dim"]

    @classmethod
    def absent_text(cls, denoiser_config: Mapping[str, Any], components: Container[str]) -> int:
        """Return the numbers of all zeros but one that stand in T5's place where it is missing."""
        return 0 if "text_encoder_3" in components else (T5_LENGTH - 1) * denoiser_config["joint_attention_dim"]

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse what the flow families refuse, and pictures beyond the transformer's table of positions."""
        super().check_trainable(source, denoiser, vae, resolution)
        largest = denoiser["pos_embed_max_size"] * cls.patch_size(denoiser) * cls.scale_factor_of(vae)
        cls._check_positions(source, largest, resolution)

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return T5, or CLIP where that is missing; see Backbone."""
        return (tokenizers[2], prompts, T5_LENGTH) if len(tokenizers) > 2 else super().read_texts(tokenizers, prompts)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return CLIP's penultimate hidden states, padded to T5's width and followed by T5's states [N,L+256,D].

        Without T5 a single zero [N,L+1,D] follows. The pooled embeddings are both projections side by side.
        """
        length = self.tokenizers[0].model_max_length  # of both, as in the pipeline
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.text_encoders[:2], strict=True):
            tokens = self._tokenize(tokenizer, prompts, length).input_ids.to(encoder.device)
            output = encoder(tokens, output_hidden_states=True)
            states.append(output.hidden_states[-2].to(self.text_encoders[0].dtype))
            pooled.append(output[0])
        clip, t5 = torch.cat(states, dim=-1), self._t5_states(prompts)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"prompt_embeds": torch.cat([clip, t5], dim=1), "pooled_prompt_embeds": torch.cat(pooled, dim=-1)}

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return v [N,C,h,w] in the denoiser's dtype; it takes timesteps as they are, from 0 to 1000."""
        dtype = self._dtype(denoiser)
        text, options = cond["prompt_embeds"].to(dtype), {}
        if self._lacks_t5 and repeats_text(denoiser):
            options["joint_attention_kwargs"] = {REPEATS: T5_LENGTH}
        elif self._lacks_t5:
            text = F.pad(text, (0, 0, 0, T5_LENGTH - 1))
        return denoiser(
            hidden_states=xt.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
            **options,
        )[0]

    @classmethod
    def drawing_options(cls, pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
        """Return what makes a pipeline without T5 compute one zero in its place, where the transformer can."""
        networks = getattr(pipeline.transformer, "networks", [pipeline.transformer])  # of a negative branch two
        if pipeline.text_encoder_3 is not None or not all(map(repeats_text, networks)):
            return {}
        return {"max_sequence_length": 1, "joint_attention_kwargs": {REPEATS: T5_LENGTH}}

    def pipeline(self) -> StableDiffusion3Pipeline:
        """Return a StableDiffusion3Pipeline over these modules."""
        t5, tokenizer = (parts[2] if len(parts) > 2 else None for parts in (self.text_encoders, self.tokenizers))
        return StableDiffusion3Pipeline(
            transformer=self.denoiser,
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            text_encoder_3=t5,
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            tokenizer_3=tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )

    @property
    def _lacks_t5(self) -> bool:
        return len(self.text_encoders) < 3

    def _t5_states(self, prompts: list[str]) -> Tensor:
        if self._lacks_t5:
            like, width = self.text_encoders[0], self.denoiser.config.joint_attention_dim
            return torch.zeros(len(prompts), 1, width, device=like.device, dtype=like.dtype)
        encoder = self.text_encoders[2]
        tokens = self._tokenize(self.tokenizers[2], prompts, T5_LENGTH).input_ids
        return encoder(tokens.to(encoder.device))[0]

    def _check_parts(self) -> None:
        super()._check_parts()
        encoders, tokenizers = len(self.text_encoders), len(self.tokenizers)
        if encoders != tokenizers:
            raise ModelError(
                f'"{self.source}" has {encoders} text encoders and {tokenizers} tokenizers. Of T5, give both '
                "(text_encoder_3, tokenizer_3) or neither."
            )
        if self._lacks_t5:
            logger.warning(
                '"%s" has no T5 (text_encoder_3): zeros take the place of its embeddings, in training and in drawing. '
                "Long prompts and text in pictures suffer; short prompts hardly do.",
                self.source,
            )
