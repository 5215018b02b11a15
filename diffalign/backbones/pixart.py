"""PixArt-alpha and PixArt-Sigma: T5 alone, and a transformer on DDPM's path (arXiv 2310.00426, 2403.04692)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from diffalign.backbones.adapters import ATTENTION
from diffalign.backbones.conditioning import MASK, Conditioning
from diffalign.backbones.ddpm import check_ddpm
from diffalign.backbones.files import LORA_FILE
from diffalign.backbones.transformer import TransformerBackbone, about_tokens
from diffalign.denoising.paths import DDPMPath
from diffalign.errors import ModelError

TOLD_SIDE = 128  # latents a side of the networks that PixArt-alpha's pipeline tells the size of the picture
# The pipelines' `clean_caption` is on by default, and has no effect unless both packages are there.
CLEANS = is_bs4_available() and is_ftfy_available()


class PixArt(TransformerBackbone):
    """Adapt what both generations are: latents of 4 channels, a noise prediction with a variance beside it, T5."""

    learning = "denoising"
    denoiser_class = PixArtTransformer2DModel
    required = frozenset({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"})
    encoder_classes = (T5EncoderModel,)
    tokenizer_classes = (T5Tokenizer,)
    text_columns = token_columns = ("prompt_embeds", MASK)
    repeated_blocks = ("BasicTransformerBlock",)
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")  # of both attentions of a block
    silent_guidance = True
    text_length: ClassVar[int]  # tokens, the pipeline's `max_sequence_length`

    @classmethod
    def patch_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the side of the patches that become tokens."""
        return denoiser_config["patch_size"]

    @classmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the numbers of T5's tokens and of their mask."""
        return cls.text_length * (denoiser_config["caption_channels"] + 1)

    @classmethod
    def prompt_tokens(cls, tokenizers: Sequence[Any], prompts: list[str]) -> int:
        """Return how many tokens prompts have, not cleaned, with the one that ends them; see Backbone."""
        if not tokenizers:
            return about_tokens(prompts, 1, cls.text_length)
        texts = [prompt.lower().strip() for prompt in prompts]
        return sum(map(len, tokenizers[0](texts, max_length=cls.text_length, truncation=True).input_ids))

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return T5 and prompts that are not cleaned; see Backbone."""
        return tokenizers[0], [prompt.lower().strip() for prompt in prompts], cls.text_length

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse PixArt-LCM under other names."""
        if (name := scheduler.get("_class_name")) == "LCMScheduler":
            raise cls._is_distilled(source, name)

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse few-step models, resolutions, and networks that their pipeline leaves without the sizes they want."""
        super().check_trainable(source, denoiser, vae, resolution)
        if _wants_sizes(denoiser) and not cls._tells_sizes(denoiser):
            raise ModelError(
                f'The transformer of "{source}" wants the size of the picture (use_additional_conditions), which its '
                f"{cls.pipeline_class.__name__} does not tell a network of sample_size {denoiser['sample_size']}: it "
                "could not draw. Put back the config.json that the model came with."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return T5's last hidden states [N,L,D] of the prompts, lower-cased or cleaned, zeros where none is."""
        encoder = self.text_encoders[0]
        texts = self.pipeline()._text_preprocessing(list(prompts), clean_caption=CLEANS)
        tokens = self._tokenize(self.tokenizers[0], texts, self.text_length).to(encoder.device)
        mask = tokens.attention_mask.bool()
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"prompt_embeds": states.masked_fill(~mask[..., None], 0.0), MASK: mask}

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor | None) -> Conditioning:
        """Add the size of the picture to the text, for networks that are told: height, width and their ratio.

        Raises:
            ModelError: a column of text is missing, or `sizes` is not [N,6].
        """
        cond = super().condition(text, sizes)
        if not _wants_sizes(self.denoiser.config):
            return cond
        if sizes is None or sizes.shape != (len(cond), 6):
            shape = None if sizes is None else list(sizes.shape)
            raise ModelError(
                f'The transformer of "{self.source}" is told the size of the picture. It needs sizes of shape '
                f"[{len(cond)},6] that end in the height and width drawn, got {shape}."
            )
        drawn = sizes[:, 4:].float()
        return Conditioning({**cond.columns, "resolution": drawn, "aspect_ratio": drawn[:, :1] / drawn[:, 1:]})

    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return the noise [N,C,h,w] in the denoiser's dtype; a variance that it predicts besides is dropped."""
        dtype = self._dtype(denoiser)
        told = {name: cond[name] if name in cond.columns else None for name in ("resolution", "aspect_ratio")}
        output = denoiser(
            xt.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond[MASK],
            timestep=timesteps,
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
        return output[:, : xt.shape[1]]

    def fingerprint(self) -> str:
        """Return a hash of all that decides the latents and embeddings, and whether prompts are cleaned."""
        return super().fingerprint() + ("-cleaned" if CLEANS else "")

    @classmethod
    def guidance_arguments(cls, pipeline: Any, scale: float, negative_prompt: str, number: int) -> dict[str, Any]:
        """Return how the pipeline is told to guide `number` pictures: it takes no None for a negative prompt."""
        return {"guidance_scale": scale, "negative_prompt": [negative_prompt] * number}

    @classmethod
    def lora_usage(cls, place: str) -> list[str]:
        """Return how a stock pipeline takes a LoRA: diffusers gives this transformer no methods for adapters."""
        return [
            "class Transformer(diffusers.PixArtTransformer2DModel, diffusers.loaders.PeftAdapterMixin): ...",
            "pipe.transformer.__class__ = Transformer",
            f'pipe.transformer.load_lora_adapter("{place}", weight_name="{LORA_FILE}")',
        ]

    @classmethod
    def drawing_options(cls, pipeline: Any) -> dict[str, Any]:
        """Return what lets the pipeline draw the size it is asked for, and not a near one that is then resized."""
        return {"use_resolution_binning": False, "clean_caption": CLEANS}

    @classmethod
    def _tells_sizes(cls, denoiser_config: Mapping[str, Any]) -> bool:
        """Tell whether the pipeline tells such a network the size of the picture."""
        return False

    def _noise_path(self) -> DDPMPath:
        return DDPMPath.from_config(self.scheduler.config)

    def _check_parts(self) -> None:
        super()._check_parts()
        check_ddpm(self, "Put back the parts that the model came with.")


class PixArtAlpha(PixArt):
    """Adapt PixArtAlphaPipeline checkpoints: PixArt-XL-2 at 256, 512 and 1024 pixels, and their fine-tunes."""

    family = "pixart-alpha"
    hub_mark = "PixArt-"  # of PixArt-XL-2 ... and PixArt-Alpha-DMD; the longer one of Sigma's ids comes first
    pipeline_class = PixArtAlphaPipeline
    text_length = padded_length = 120

    @classmethod
    def _tells_sizes(cls, denoiser_config: Mapping[str, Any]) -> bool:
        return denoiser_config["sample_size"] == TOLD_SIDE


class PixArtSigma(PixArt):
    """Adapt PixArtSigmaPipeline checkpoints, and their fine-tunes."""

    family = "pixart-sigma"
    hub_mark = "PixArt-Sigma"
    pipeline_class = PixArtSigmaPipeline
    text_length = padded_length = 300


def _wants_sizes(denoiser_config: Mapping[str, Any]) -> bool:
    """Tell whether a network has embeddings of the picture's size; diffusers decides by its side if nothing is said."""
    said = denoiser_config.get("use_additional_conditions")
    return denoiser_config["sample_size"] == TOLD_SIDE if said is None else said
