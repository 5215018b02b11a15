"""What the families of flow matching share: a transformer that predicts v, and levels of noise moved by a shift."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.backbones.layer_names import LayerNames
from diffalign.backbones.transformer import TransformerBackbone
from diffalign.denoising.paths import NoisePath, path_of
from diffalign.denoising.shifts import Shift, shift_of
from diffalign.errors import ConfigError, ModelError


class FlowBackbone(TransformerBackbone):
    """Adapt what is made of a transformer trained by flow matching.

    `predict` returns v = noise - x0 whatever sign and time the network has.
    """

    ddim_steps = False
    learning = "flow matching"
    original_names: ClassVar[LayerNames | None] = None  # of the layers, where LoRAs of other programs are to be read
    mu_rule: ClassVar[Literal["tokens", "flux2"]] = "tokens"  # by which its pipeline shifts, where the picture decides
    packing_side: ClassVar[int] = 1  # latents that a token is high and wide where the transformer is given tokens
    # What policy and reference are told in training, if they have an embedding of it: the distilled guidance scale, as
    # in diffusers' scripts of fine-tuning FLUX.1. Drawing tells the network its own, usually 3.5.
    guidance: ClassVar[float] = 1.0

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

    def _told_guidance(self, xt: Tensor) -> Tensor | None:
        """Return the guidance scale [N] that a guidance-distilled network is told, None for all others."""
        if not self.denoiser.config.guidance_embeds:
            return None
        return torch.full([len(xt)], self.guidance, device=xt.device)

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
