"""The families there are, and which of them a pipeline is of. A new one is a file here and a name in FAMILIES."""

import re
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffalign.backbones.base import Backbone
from diffalign.backbones.flux import Flux
from diffalign.backbones.pixart import PixArtAlpha, PixArtSigma
from diffalign.backbones.qwen_image import QwenImage
from diffalign.backbones.sd3 import SD3
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.backbones.z_image import ZImage
from diffalign.errors import ModelError

FAMILIES: tuple[type[Backbone], ...] = (
    *(SD15, SDXL, SD3, Flux, PixArtAlpha, PixArtSigma),
    *(QwenImage, ZImage),
)
PIPELINES = {family.pipeline_class.__name__: family for family in FAMILIES}
BY_NAME = {family.family: family for family in FAMILIES}
# Of pipelines that are not of text to image, in the names of diffusers' classes.
GIVEN_A_PICTURE = re.compile("Edit|Img2Img|Inpaint|Kontext|Fill|ControlNet|Layered")
DENOISERS = tuple(dict.fromkeys(family.denoiser_name for family in FAMILIES))  # names of folders, too: unet/ ...


def kind_of(denoiser: nn.Module) -> type[Backbone]:
    """Return the first family with denoisers of this class; those that share one share all that is asked of it here."""
    return next(family for family in FAMILIES if isinstance(denoiser, family.denoiser_class))


def name_of(denoiser: nn.Module) -> str:
    """Return what pipelines, folders and the keys of LoRA files call such a denoiser."""
    return kind_of(denoiser).denoiser_name


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """Return under which name a pipeline of any of the families holds its denoiser."""
    return next(name for name in DENOISERS if getattr(pipeline, name, None) is not None)


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """Return the network of a pipeline that denoises."""
    return getattr(pipeline, denoiser_name(pipeline))


def with_denoiser(pipeline: DiffusionPipeline, denoiser: nn.Module) -> DiffusionPipeline:
    """Put `denoiser` in the place of the pipeline's own, and return the pipeline."""
    pipeline.register_modules(**{denoiser_name(pipeline): denoiser})
    return pipeline


def pipeline_kind(pipeline: DiffusionPipeline) -> type[Backbone]:
    """Return the family of a pipeline, which may be of a class derived from the family's."""
    return next(family for family in FAMILIES if isinstance(pipeline, family.pipeline_class))


def has_unconditional_branch(pipeline: DiffusionPipeline) -> bool:
    """Tell whether guidance weighs a prediction without the prompt; a guidance-distilled network is told the scale."""
    # Of a pipeline itself it would ask for a scale.
    kind = pipeline_kind(pipeline)
    said = hasattr(type(pipeline), "do_classifier_free_guidance")
    return said or kind.separate_branches or kind.silent_guidance


def family_of(pipeline_class: str, source: str) -> type[Backbone]:
    """Return the family of a pipeline class, as model_index.json names it.

    Raises:
        ModelError: no family has such pipelines.
    """
    if pipeline_class not in PIPELINES:
        given = ", which is given a picture besides the prompt: use the text-to-image model"
        also = given if GIVEN_A_PICTURE.search(pipeline_class) else ""
        known = ", ".join(f"{family.family} ({name})" for name, family in PIPELINES.items())
        raise ModelError(
            f'"{source}" is a {pipeline_class}{also}. Supported: {known}; other families are not supported yet.'
        )
    return PIPELINES[pipeline_class]
