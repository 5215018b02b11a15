"""The embedded models: how each is built and trained, by the name its folder in assets/ has after "tiny-"."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from diffalign.shapes import pipeline, sd3
from diffalign.shapes.recipe import Pretraining


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """Say how an embedded model is built (from a seed) and trained."""

    build: Callable[[int], DiffusionPipeline]
    recipe: Pretraining


MODELS = {
    "sdxl": EmbeddedModel(build=pipeline.build_pipeline, recipe=Pretraining()),
    "sd3": EmbeddedModel(
        build=sd3.build_pipeline,
        recipe=Pretraining(epsilon_steps=0, denoiser_steps=9_000, denoiser_learning_rate=1e-3, denoiser_bf16=False),
    ),
}
