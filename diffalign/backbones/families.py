"""The families there are, and which of them a pipeline is of. A new one is a file here and a name in FAMILIES."""

import re
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffalign.backbones.adapters import has_adapters
from diffalign.backbones.base import TEXT_ENCODERS, Backbone, present
from diffalign.backbones.flux import Flux
from diffalign.backbones.flux2 import Flux2
from diffalign.backbones.lumina2 import Lumina2
from diffalign.backbones.pixart import PixArtAlpha, PixArtSigma
from diffalign.backbones.qwen_image import QwenImage
from diffalign.backbones.sana import Sana
from diffalign.backbones.sd3 import SD3
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.backbones.z_image import ZImage
from diffalign.errors import ModelError

FAMILIES: tuple[type[Backbone], ...] = (
    SD15,
    SDXL,
    SD3,
    Flux,
    Flux2,
    Lumina2,
    PixArtAlpha,
    PixArtSigma,
    QwenImage,
    Sana,
    ZImage,
)
PIPELINES = {
    pipeline.__name__: family for family in FAMILIES for pipeline in (family.pipeline_class, *family.other_pipelines)
}
PIPELINES |= {name: family for family in FAMILIES for name in family.older_pipelines}
BY_NAME = {family.family: family for family in FAMILIES}
# What pipelines with these in the names of diffusers' classes do, and what to use instead.
OTHER_TASKS = {
    "Edit|Img2Img|Inpaint|Kontext|Fill|ControlNet|Layered": "is given a picture besides the prompt: use the "
    "text-to-image model",
    "Sprint": "is distilled to draw in a few steps: train the model that it was distilled from",
    "Video": "makes films: use the text-to-image model",
}
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


def adapted(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """Return the networks of a pipeline that carry a LoRA: its denoiser first, then text encoders."""
    networks = [denoiser_of(pipeline), *present(pipeline.components, TEXT_ENCODERS)]
    return [network for network in networks if has_adapters(network)]


def with_denoiser(pipeline: DiffusionPipeline, denoiser: nn.Module) -> DiffusionPipeline:
    """Put `denoiser` in the place of the pipeline's own, and return the pipeline."""
    pipeline.register_modules(**{denoiser_name(pipeline): denoiser})
    return pipeline


def pipeline_kind(pipeline: DiffusionPipeline) -> type[Backbone]:
    """Return the family of a pipeline, which may be of a class derived from the family's."""
    return next(kind for kind in FAMILIES if isinstance(pipeline, (kind.pipeline_class, *kind.other_pipelines)))


def has_unconditional_branch(pipeline: DiffusionPipeline) -> bool:
    """Tell whether guidance weighs a prediction without the prompt; a guidance-distilled network is told the scale."""
    kind = pipeline_kind(pipeline)
    guides = hasattr(type(pipeline), "do_classifier_free_guidance")  # of a pipeline it would ask for a scale
    said = guides and not pipeline.config.get("is_distilled", False)
    return said or kind.separate_branches or kind.silent_guidance


def family_of(pipeline_class: str, source: str) -> type[Backbone]:
    """Return the family of a pipeline class, as model_index.json names it.

    Raises:
        ModelError: no family has such pipelines.
    """
    if pipeline_class not in PIPELINES:
        also = next((f", which {why}" for mark, why in OTHER_TASKS.items() if re.search(mark, pipeline_class)), "")
        known = ", ".join(f"{family.family} ({family.pipeline_class.__name__})" for family in FAMILIES)
        raise ModelError(
            f'"{source}" is a {pipeline_class}{also}. Supported: {known}; other families are not supported yet.'
        )
    return PIPELINES[pipeline_class]
