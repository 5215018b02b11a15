"""What the families with a transformer share, whatever path of noise it was trained on."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffalign.backbones.base import Backbone
from diffalign.errors import ModelError

CHARACTERS = 4  # of English that become a token, about


def about_tokens(prompts: Sequence[str], around: int, longest: int) -> int:
    """Return about how many tokens prompts are, of at most `longest` each; `around`: of the template around them."""
    return sum(min(longest, around - (-len(prompt) // CHARACTERS)) for prompt in prompts)


class TransformerBackbone(Backbone):
    """Adapt what is made of a transformer over patches of latents."""

    denoiser_name = "transformer"
    large_text = True
    hub_mark: ClassVar[str]  # in the hub ids of its models, in whatever case; of an id with several the longest counts
    # Of hub ids and folders: no configuration says that a model was distilled to a few steps.
    few_steps: ClassVar[re.Pattern[str]] = re.compile(
        r"turbo|lightning|hyper-?sd|flash|schnell|distill|\blcm\b|\bdmd|sprint", re.IGNORECASE
    )
    learning: ClassVar[str]  # how it is trained here, as its errors say

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

    @classmethod
    def _is_distilled(cls, source: str, sign: str) -> ModelError:
        """Return why a few-step model is not trained; `sign` says by what it is known."""
        return ModelError(
            f'"{source}" ({sign}) is distilled to draw in a few steps. Learning from given pictures by {cls.learning} '
            "would undo that: its pictures would blur at the steps it is made for. Train the model that it was "
            "distilled from, and put the LoRA on this one when drawing."
        )

    @staticmethod
    def _check_positions(source: str, largest: int, resolution: int) -> None:
        """Refuse pictures larger than those whose every token has a position of its own."""
        if resolution > largest:
            raise ModelError(
                f'"{source}" knows positions of pictures of up to {largest} pixels a side; data.resolution is '
                f"{resolution}. Lower it."
            )

    def pipeline(self) -> Any:
        """Return the pipeline of these modules' kind over them; of one text encoder, unless a family says otherwise."""
        return self.own_pipeline(
            transformer=self.denoiser,
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            **self._pipeline_options(),
        )

    def _pipeline_options(self) -> dict[str, Any]:
        """Return arguments of the pipeline's constructor that are no modules."""
        return {}

    def _check_parts(self) -> None:
        channels = self.latent_channels_of(self.denoiser.config)
        if channels != self.latent_channels:
            raise ModelError(
                f'The transformer of "{self.source}" takes {channels} channels, the VAE makes {self.latent_channels}. '
                "Inpainting and edit checkpoints cannot be trained here: use the text-to-image model."
            )
