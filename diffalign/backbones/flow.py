"""What the families of flow matching share: a transformer that predicts v, and levels of noise moved by a shift."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.backbones.base import Backbone
from diffalign.backbones.layer_names import LayerNames
from diffalign.denoising.paths import NoisePath, path_of
from diffalign.denoising.shifts import Shift, shift_of
from diffalign.errors import ConfigError, ModelError

CHARACTERS = 4  # of English that become a token, about


def about_tokens(prompts: Sequence[str], around: int, longest: int) -> int:
    """Return about how many tokens prompts are, of at most `longest` each; `around`: of the template around them."""
    return sum(min(longest, around - (-len(prompt) // CHARACTERS)) for prompt in prompts)


class FlowBackbone(Backbone):
    """Adapt what is made of a transformer trained by flow matching.

    `predict` returns v = noise - x0 whatever sign and time the network has.
    """

    denoiser_name = "transformer"
    ddim_steps = False
    large_text = True
    hub_mark: ClassVar[str]  # in the hub ids of its models, in whatever case, and of no others
    original_names: ClassVar[LayerNames | None] = None  # of the layers, where LoRAs of other programs are to be read
    mu_rule: ClassVar[Literal["tokens", "flux2"]] = "tokens"  # by which its pipeline shifts, where the picture decides
    packing_side: ClassVar[int] = 1  # latents that a token is high and wide where the transformer is given tokens
    # What policy and reference are told in training, if they have an embedding of it: the distilled guidance scale, as
    # in diffusers' scripts of fine-tuning FLUX.1. Drawing tells the network its own, usually 3.5.
    guidance: ClassVar[float] = 1.0
    # Of hub ids and folders: no configuration says that a model was distilled to a few steps.
    few_steps: ClassVar[re.Pattern[str]] = re.compile(
        r"turbo|lightning|hyper-?sd|flash|schnell|distill|\blcm\b|\bdmd|sprint", re.IGNORECASE
    )

    @classmethod
    def layer_names(cls, denoiser: nn.Module | None = None) -> LayerNames | None:
        """Return `original_names`: the names hold for every size of the transformer."""
        return cls.original_names

    @classmethod
    def shift(cls, scheduler_config: Mapping[str, Any], tokens: int) -> Shift:
        """Return how the model's scheduler moves the levels of noise of a picture of `tokens` tokens.

        Raises:
            ModelError: it is no scheduler of flow matching that is known.
        """
        try:
            return shift_of(scheduler_config, tokens, mu_rule=cls.mu_rule)
        except ConfigError as error:
            raise ModelError(str(error)) from error

    @classmethod
    def patch_size(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return the side of the patches that become tokens, in the transformer or before it."""
        return denoiser_config["patch_size"] * cls.packing_side

    @classmethod
    def latent_channels_of(cls, denoiser_config: Mapping[str, Any]) -> int:
        """Return C of the latents that the transformer denoises, packed or not."""
        return denoiser_config["in_channels"] // cls.packing_side**2

    @classmethod
    def check_trainable(cls, source: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> None:
        """Refuse few-step models, and pictures that no whole number of tokens covers."""
        cls.check_name(source)
        super().check_trainable(source, denoiser, vae, resolution)

    @classmethod
    def check_name(cls, source: str) -> None:
        """Refuse few-step models."""
        if found := cls.few_steps.search(source.rstrip("/").rsplit("/", 1)[-1]):
            raise cls._is_distilled(source, f'"{found[0]}"')

    @classmethod
    def check_index(cls, source: str, index: Mapping[str, Any]) -> None:
        """Refuse few-step models that the model_index.json tells."""
        return

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse few-step models that no name tells, but the configurations of transformer and scheduler do."""
        return

    @staticmethod
    def _is_distilled(source: str, sign: str) -> ModelError:
        """Return why a few-step model is not trained; `sign` says by what it is known."""
        return ModelError(
            f'"{source}" ({sign}) is distilled to draw in a few steps. Learning from given pictures by flow matching '
            "would undo that: its pictures would blur at the steps it is made for. Train the model that it was "
            "distilled from, and put the LoRA on this one when drawing."
        )

    def _told_guidance(self, xt: Tensor) -> Tensor | None:
        """Return the guidance scale [N] that a guidance-distilled network is told, None for all others."""
        if not self.denoiser.config.guidance_embeds:
            return None
        return torch.full([len(xt)], self.guidance, device=xt.device)

    @staticmethod
    def _check_positions(source: str, largest: int, resolution: int) -> None:
        """Refuse pictures larger than those whose every token has a position of its own."""
        if resolution > largest:
            raise ModelError(
                f'"{source}" knows positions of pictures of up to {largest} pixels a side; data.resolution is '
                f"{resolution}. Lower it."
            )

    def _noise_path(self) -> NoisePath:
        try:
            path = path_of(self.scheduler.config)
        except ConfigError as error:
            raise ModelError(f'The {type(self.scheduler).__name__} of "{self.source}": {error}') from error
        if path.prediction_type != "flow_prediction":
            raise ModelError(
                f'The {type(self.scheduler).__name__} of "{self.source}" is not one of flow matching, which '
                f"{self.family} was trained by. Put back the scheduler_config.json the model came with."
            )
        return path

    def _check_parts(self) -> None:
        channels = self.latent_channels_of(self.denoiser.config)
        if channels != self.latent_channels:
            raise ModelError(
                f'The transformer of "{self.source}" takes {channels} channels, the VAE makes {self.latent_channels}. '
                "Inpainting and edit checkpoints cannot be trained here: use the text-to-image model."
            )
