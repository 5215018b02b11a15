"""Who draws the pictures of the embedded world's pairs: several models at several guidances, as on Pick-a-Pic.

Each picture keeps the name of the model and the guidance that drew it, so that studies can tell a model's own samples
from those of others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from diffalign.backbones import loading
from diffalign.errors import DataError
from diffalign.evaluation import SamplingSettings, generate


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Name a model of the world ("base", "early" or "strong") and how it is sampled."""

    kind: str
    guidance: float
    share: float  # of the pictures

    def model(self, base: str) -> str:
        """Return the name of the model's folder, given the base's."""
        return base if self.kind == "base" else f"{base}-{self.kind}"


GENERATORS = (
    Generator(kind="early", guidance=3.0, share=0.2),
    Generator(kind="base", guidance=1.5, share=0.15),
    Generator(kind="base", guidance=2.5, share=0.3),
    Generator(kind="base", guidance=5.0, share=0.1),
    Generator(kind="strong", guidance=2.5, share=0.25),
)


def choose(number: int, rng: random.Random, generators: Sequence[Generator] = GENERATORS) -> list[Generator]:
    """Return who draws each of `number` pictures, at random by their shares."""
    return rng.choices(generators, [generator.share for generator in generators], k=number)


def draw(
    folders: dict[str, Path], prompts: list[str], seeds: list[int], by: list[Generator], settings: SamplingSettings
) -> list[Image.Image]:
    """Draw every prompt from its seed by its generator; `folders` holds the models by kind.

    Raises:
        DataError: a model that has not been trained here.
    """
    images: list[Image.Image | None] = [None] * len(prompts)
    for kind in sorted({generator.kind for generator in by}):
        if not folders[kind].is_dir():
            raise DataError(
                f"There is no {folders[kind]}. It is trained with the base: diffalign shapes build --parts pipeline."
            )
        pipeline = loading.load(folders[kind]).pipeline()
        for generator in dict.fromkeys(by):
            if generator.kind != kind:
                continue
            places = [place for place, chosen in enumerate(by) if chosen == generator]
            sampling = replace(settings, guidance_scale=generator.guidance)
            drawn = generate(pipeline, [prompts[i] for i in places], [seeds[i] for i in places], sampling)
            for place, image in zip(places, drawn, strict=True):
                images[place] = image
    return images
