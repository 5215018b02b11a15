"""What every model family offers to the rest of diffalign, and the code the families share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.backbones.adapters import ATTENTION
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.digests import tokenizer_identity, update_with_tensors
from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.pictures import Pictures
from diffalign.backbones.quantization import dtype_of
from diffalign.denoising.shifts import Shift
from diffalign.errors import ModelError

CLIP_LENGTH = 77  # tokens, of the published CLIP text encoders
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Backbone(Pictures, ABC):
    """Adapt one model family: encode prompts and images, predict, decode.

    The denoiser is the caller's to train; the VAE and the text encoders are frozen here.

    Raises:
        ModelError: the parts do not form a text-to-image model of this family.
    """

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    other_pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = ()  # of its models that have another text encoder
    older_pipelines: ClassVar[tuple[str, ...]] = ()  # what diffusers called `pipeline_class`, in folders of that time
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_name: ClassVar[str]  # of the denoiser in a pipeline, of its folder and before its keys in a LoRA file
    # How names of tensors begin in a file of its denoiser alone, by its original code or by diffusers, and of no other;
    # none: such files are not read.
    file_marks: ClassVar[tuple[str, ...]] = ()
    vae_class: ClassVar[type[nn.Module]] = AutoencoderKL
    encoder_classes: ClassVar[tuple[type, ...]] = (CLIPTextModel, CLIPTextModelWithProjection)
    tokenizer_classes: ClassVar[tuple[type, ...]] = (CLIPTokenizer,)
    required: ClassVar[frozenset[str]]  # components without which there is nothing to train
    text_columns: ClassVar[tuple[str, ...]]  # what `encode_prompts` returns, and caches keep
    token_columns: ClassVar[tuple[str, ...]] = ()  # those of TOKENS, with a mask, whose padding caches leave out
    padded_length: ClassVar[int | None] = None  # to how many tokens these are padded
    ignores_padding: ClassVar[bool] = False  # `predict` drops it: batches from caches are as long as their longest
    large_text: ClassVar[bool] = False  # caches keep prompts in the precision that half-precision denoisers have
    repeated_blocks: ClassVar[tuple[str, ...]]  # classes of the denoiser's parts that FSDP makes whole one at a time
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION  # ends of the names of the layers that a LoRA adapts
    ddim_steps: ClassVar[bool] = True  # it is sampled by DDIM's steps, whose distribution online objectives learn from
    prompt_first: ClassVar[bool] = False  # its pipeline guides with [prompts, empty ones], and not the other way round
    separate_branches: ClassVar[bool] = False  # its pipeline guides with two calls, of the prompts and of empty ones
    noise_patches: ClassVar[int] = 1  # side of the patches that its pipeline draws as channels of one place
    noise_dtype: ClassVar[torch.dtype | None] = None  # that its pipeline draws noise in; None: that of encoded prompts
    silent_guidance: ClassVar[bool] = False  # its pipeline guides with both, and has no property that says so
    cuts_text: ClassVar[bool] = False  # its denoiser is given texts cut on the host, each batch to other lengths
    plain_attention: ClassVar[bool] = False  # its attention is that of the UNets, of which kernels can be chosen

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        vae: nn.Module,
        tokenizers: list,
        text_encoders: list[nn.Module],
        scheduler: Any,
        source: str,
        options: dict[str, Any] | None = None,
    ):
        """Take over the parts of a loaded pipeline."""
        self.denoiser = denoiser
        self.vae = vae
        self.tokenizers = tokenizers
        self.text_encoders = text_encoders
        self.scheduler = scheduler
        self.source = source
        self.options = options or {}  # arguments of the pipeline's constructor that are not modules
        self._check_parts()
        self.path = self._noise_path()
        self._fingerprint: str | None = None
        for module in self.encoders():
            module.requires_grad_(False).eval()

    @classmethod
    def over(cls, pipeline: DiffusionPipeline, source: str, options: dict[str, Any] | None = None) -> Self:
        """Adapt the modules of a pipeline of this family, which become frozen but for the denoiser."""
        return cls(
            denoiser=getattr(pipeline, cls.denoiser_name),
            vae=pipeline.vae,
            tokenizers=present(pipeline.components, TOKENIZERS),
            text_encoders=present(pipeline.components, TEXT_ENCODERS),
            scheduler=pipeline.scheduler,
            source=source,
            options=options,
        )

    @classmethod
    def idle_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return the names of layers that the prediction does not depend on: adapters there would never learn."""
        return ()

    @classmethod
    def layer_names(cls, denoiser: nn.Module | None = None) -> LayerNames | None:
        """Return what other programs call the layers of `denoiser` (None: of the published one); None: nobody knows."""
        return None

    @classmethod
    def unread_layers(cls, denoiser: nn.Module) -> tuple[str, ...]:
        """Return the names of idle layers that no gradient reaches at all, which DDP would wait for in vain."""
        return ()

    @classmethod
    def guidance_arguments(cls, pipeline: Any, scale: float, negative_prompt: str, number: int) -> dict[str, Any]:
        """Return how the pipeline is told to guide `number` pictures; "" is its own default."""
        return {"guidance_scale": scale} | ({"negative_prompt": [negative_prompt] * number} if negative_prompt else {})

    @classmethod
    @abstractmethod
    def prompt_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return how many numbers the `text_columns` of a prompt hold, for tokenizers of the published lengths."""

    @classmethod
    def absent_text(cls, denoiser_config: Mapping[str, Any], components: Container[str]) -> int:
        """Return how many of `prompt_size` numbers a pipeline does not have that has these components only."""
        return 0

    @classmethod
    def prompt_tokens(cls, tokenizers: Sequence[Any], prompts: list[str]) -> int:
        """Return how many tokens prompts have in all, padding left out; about as many if no tokenizers are given."""
        raise NotImplementedError(f"{cls.family} keeps padding: it has no token_columns")

    @classmethod
    def read_texts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[Any, list[str], int]:
        """Return the tokenizer that reads most of a prompt, the texts it is given, and how many tokens are read."""
        return tokenizers[0], prompts, tokenizers[0].model_max_length

    @classmethod
    def token_counts(cls, tokenizers: Sequence[Any], prompts: list[str]) -> tuple[list[int], int]:
        """Return how many tokens prompts have before anything is cut, marks included, and how many are read."""
        tokenizer, texts, limit = cls.read_texts(tokenizers, prompts)
        tokens = tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
        return [len(ids) for ids in tokens], limit

    @classmethod
    def long_prompts_fault(cls, how: str) -> str | None:
        """Say why long prompts cannot be read so; None if they can, as all can by "truncate"."""
        if how == "truncate":
            return None
        return (
            f'"{how}" means nothing for {cls.family}: it is for the CLIP encoders of SD1.5 and SDXL, and those of '
            f"{cls.family} are given longer prompts as a whole. Use truncate."
        )

    @classmethod
    def long_prompt_arguments(cls, pipeline: Any, prompts: list[str], negative_prompt: str) -> dict[str, Any]:
        """Return how the pipeline is told of prompts that are read as a whole, in chunks."""
        raise NotImplementedError(cls.long_prompts_fault("chunk"))

    @classmethod
    def shift(cls, scheduler_config: Mapping[str, Any], tokens: int) -> Shift:
        """Return how the model's scheduler moves levels of noise for a picture of `tokens` tokens; DDPM's does not."""
        return Shift()

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse to train what configurations alone show cannot be, at pictures of `resolution` pixels a side.

        Raises:
            ModelError: such a model or resolution.
        """
        cls._check_side(resolution, resolution, cls.scale_factor_of(vae) * cls.patch_size(denoiser))

    def shift_at(self, resolution: int) -> Shift:
        """Return how the scheduler moves levels of noise for pictures of `resolution` pixels a side."""
        side = resolution // (self.vae_scale_factor * self.patch_size(self.denoiser.config))
        return self.shift(self.scheduler.config, side**2)

    @property
    def own_pipeline(self) -> type[DiffusionPipeline]:
        """Return the pipeline class of this very model, where the family has several."""
        return self.pipeline_class

    @property
    def native_resolution(self) -> int:
        """Return how many pixels the pictures are high and wide that the denoiser was made for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the `text_columns` [N,...] of N prompts by name, equal to diffusers' pipeline.

        Prompts longer than the tokenizer's `model_max_length` are truncated, as in the pipeline. Differentiable in the
        encoders' weights, for those who train them (LPO's judge); they are frozen here.
        """

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor | None) -> Conditioning:
        """Build the denoiser's conditioning of N entries from the `text_columns` and what the family adds to them.

        sizes: [N,6] = original height, width, crop top, left, target height, width in pixels.

        Raises:
            ModelError: a column is missing.
        """
        if missing := [name for name in self.text_columns if name not in text]:
            raise ModelError(
                f"{self.family} needs {missing[0]} of every prompt, got {', '.join(text) or 'nothing'}. "
                "Rebuild the cache with this model."
            )
        return Conditioning({name: text[name] for name in self.text_columns})

    @abstractmethod
    def predict(self, denoiser: nn.Module, xt: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return `denoiser`'s prediction [N,C,h,w] for `xt` [N,C,h,w] at `timesteps` [N], in the denoiser's dtype.

        `denoiser` is passed in because policy, reference and wrapped (DDP, compiled) networks go through this one.
        """

    @classmethod
    def lora_usage(cls, place: str) -> list[str]:
        """Return the Python that puts the LoRA in the folder or hub id `place` into a stock pipeline `pipe`."""
        return [f'pipe.load_lora_weights("{place}")']

    @classmethod
    def drawing_options(cls, pipeline: Any) -> dict[str, Any]:
        """Return arguments with which a pipeline draws the same pictures faster, or without which it would not."""
        return {}

    @abstractmethod
    def pipeline(self) -> Any:
        """Return diffusers' pipeline over these very modules with its own scheduler, safety checker off.

        Weights trained later show in it. It does not switch train/eval mode: call `denoiser.eval()` before sampling.
        """

    def fingerprint(self) -> str:
        """Return a hash of all that decides the latents and embeddings: VAE, text encoders, tokenizers, scaling."""
        if self._fingerprint is None:  # these modules are frozen
            digest = hashlib.blake2b(digest_size=16)
            digest.update(f"{self.family} {self._scaling()}".encode())
            for tokenizer in self.tokenizers:
                digest.update(tokenizer_identity(tokenizer))
            for module in self.encoders():
                update_with_tensors(digest, module)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def denoiser_fingerprint(self) -> str:
        """Return a hash of the denoiser's tensors (adapters included) and of what it predicts, as of now."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.family} {self.path.prediction_type}".encode())
        update_with_tensors(digest, self.denoiser)
        return digest.hexdigest()

    def to(
        self,
        device: torch.device | str | None = None,
        *,
        denoiser_dtype: torch.dtype | None = None,
        encoder_dtype: torch.dtype | None = None,
    ) -> Self:
        """Move every module to `device`; cast the denoiser and the encoders (VAE, text) where a dtype is given."""
        move(self.denoiser, device, denoiser_dtype)
        for module in self.encoders():
            move(module, device, encoder_dtype)
        if encoder_dtype is not None:
            self._fingerprint = None
        return self

    def offload_encoders(self, device: torch.device | str = "cpu") -> None:
        """Move the VAE and the text encoders to `device`, for runs that read latents and embeddings from a cache."""
        for module in self.encoders():
            module.to(device)

    def encoders(self) -> list[nn.Module]:
        """Return the VAE and the text encoders."""
        return [self.vae, *self.text_encoders]

    @abstractmethod
    def _noise_path(self) -> Any:
        """Return the path (of `denoising.paths`) that the model was trained on."""

    @abstractmethod
    def _check_parts(self) -> None:
        """Raise ModelError unless the parts form a model of this family that can be trained."""

    @staticmethod
    def _tokenize(tokenizer: Any, prompts: list[str], length: int | None = None, marked: bool = False) -> Any:
        return tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
            add_special_tokens=not marked,  # they are in the prompts already
        )

    @staticmethod
    def _dtype(denoiser: nn.Module) -> torch.dtype:
        return dtype_of(denoiser)


def present(components: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return those components of a pipeline that it has, in the order of the names."""
    return [components[name] for name in names if components.get(name) is not None]


def move(module: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
    """Move and cast a part of a pipeline in place."""
    # Not module.to(): with a dtype, diffusers 0.42 warns of "modules that should be kept in float32: []".
    nn.Module.to(module, device=device, dtype=dtype)
