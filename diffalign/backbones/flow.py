"""What the families of flow matching share: a transformer that predicts v, and levels of noise moved by a shift."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from diffalign.backbones.base import Backbone
from diffalign.backbones.layer_names import LayerNames
from diffalign.denoising.paths import NoisePath, path_of
from diffalign.denoising.shifts import Shift, shift_of
from diffalign.errors import ConfigError, ModelError


class FlowBackbone(Backbone):
    """Adapt what is made of a transformer trained by flow matching.

    `predict` returns v = noise - x0 whatever sign and time the network has.
    """

    denoiser_name = "transformer"
    ddim_steps = False
    hub_mark: ClassVar[str]  # in the hub ids of its models, in whatever case, and of no others
    original_names: ClassVar[LayerNames | None] = None  # of the layers, where LoRAs of other programs are to be read
    packing_side: ClassVar[int] = 1  # latents that a token is high and wide where the transformer is given tokens
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
            return shift_of(scheduler_config, tokens)
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
            raise ModelError(
                f'"{source}" ("{found[0]}") is distilled to draw in a few steps. Learning from given pictures by flow '
                "matching would undo that: its pictures would blur at the steps it is made for. Train the model that "
                "it was distilled from, and put the LoRA on this one when drawing."
            )

    @classmethod
    def check_schedule(cls, source: str, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Refuse few-step models that no name tells, but the configurations of transformer and scheduler do."""
        return

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
