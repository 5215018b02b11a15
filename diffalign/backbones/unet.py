"""What the families with a UNet share: DDPM's noise schedule, and text that several images may share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffalign.backbones import published
from diffalign.backbones.attention import shares_text
from diffalign.backbones.base import CLIP_LENGTH, Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.ddpm import check_ddpm
from diffalign.backbones.kohya import unet_names
from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.long_prompts import joined, repeated, split
from diffalign.denoising.paths import DDPMPath
from diffalign.errors import ModelError


class UNetBackbone(Backbone):
    """Adapt what is made of a UNet2DConditionModel, an AutoencoderKL and CLIP text encoders."""

    denoiser_class, denoiser_name = UNet2DConditionModel, "unet"
    file_marks = ("input_blocks.", "down_blocks.")
    required = frozenset({"unet", "vae", "text_encoder", "tokenizer", "scheduler"})
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    plain_attention = True
    long_prompts = "truncate"

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

    @classmethod
    def long_prompts_fault(cls, how: str) -> str | None:
        """Return None: CLIP reads prompts of any length in chunks."""
        return None

    @classmethod
    def long_prompt_arguments(cls, pipeline: Any, prompts: list[str], negative_prompt: str) -> dict[str, Any]:
        """Return the embeddings of prompts, and of a negative one unless the pipeline puts zeros in its place."""
        backbone = cls.over(pipeline, pipeline.config.get("_name_or_path", "the pipeline")).reading("chunk")
        zeros = not negative_prompt and getattr(pipeline.config, "force_zeros_for_empty_prompt", False)
        texts = [*prompts, *([] if zeros else [negative_prompt])]
        columns = backbone.encode_prompts(texts)
        columns["prompt_embeds"] = repeated(columns["prompt_embeds"], pipeline.tokenizer.model_max_length)
        found = {name: column[: len(prompts)] for name, column in columns.items()}
        if not zeros:
            last = {name: column[-1:] for name, column in columns.items()}
            found |= {f"negative_{n}": c.repeat(len(prompts), *(1,) * (c.ndim - 1)) for n, c in last.items()}
        return found

    def reading(self, long_prompts: str) -> Self:
        """Read prompts so from now on; in chunks, caches keep of each as many tokens as it has."""
        self.long_prompts = long_prompts
        if long_prompts == "chunk":
            self.token_columns, self.ignores_padding = ("prompt_embeds",), True
        return self

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the `text_columns` of prompts, cut to what CLIP reads or, in chunks, as a whole; see Backbone."""
        if self.long_prompts == "truncate":
            return self._encode_tokens([self._tokenize(tokenizer, prompts) for tokenizer in self.tokenizers])
        tokens, counts = split(self.tokenizers, prompts)
        return joined(self._encode_tokens(tokens), counts)

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor | None) -> Conditioning:
        """Build the conditioning; texts of several lengths are repeated to a common one."""
        if self.long_prompts == "chunk" and "prompt_embeds" in text:
            length = self.tokenizers[0].model_max_length
            text = {**text, "prompt_embeds": repeated(text["prompt_embeds"], length)}
        return super().condition(text, sizes)

    def fingerprint(self) -> str:
        """Return the hash of Backbone, and how long prompts are read if they are not cut."""
        found = super().fingerprint()
        return found if self.long_prompts == "truncate" else f"{found} {self.long_prompts}"

    @abstractmethod
    def _encode_tokens(self, tokens: Sequence[Any]) -> dict[str, Tensor]:
        """Return the `text_columns` of what each of the tokenizers returned for N prompts, or for N chunks of them."""

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
