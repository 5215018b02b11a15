"""Where a pipeline of diffusers starts from: which noise it draws for a seed."""

from diffusers import DiffusionPipeline

from diffalign.backbones.base import TEXT_ENCODERS, present
from diffalign.backbones.families import denoiser_of, pipeline_kind
from diffalign.denoising import InitialNoise

DEFAULT_SIDE = 1024  # pixels, of pipelines whose denoiser was made for no size


def initial_noise(
    pipeline: DiffusionPipeline, seed: int, height: int | None = None, width: int | None = None
) -> InitialNoise:
    """Return what the pipeline's `prepare_latents` draws for one picture with a CPU generator of its own.

    Schedulers of DDPM may scale it afterwards, and transformers that take tokens are given it packed.

    Args:
        pipeline: of one of the families.
        seed: of the generator.
        height: of the picture, pixels; None: the pipeline's own.
        width: likewise.
    """
    denoiser, scale = denoiser_of(pipeline), pipeline.vae_scale_factor
    family = pipeline_kind(pipeline)
    size = getattr(pipeline, "default_sample_size", None) or getattr(denoiser.config, "sample_size", None)
    default = DEFAULT_SIDE if size is None else size * scale
    patch = family.patch_size(denoiser.config)
    rows, columns = (patch * ((side or default) // (patch * scale)) for side in (height, width))
    dtype = family.noise_dtype or present(pipeline.components, TEXT_ENCODERS)[-1].dtype
    shape = family.latent_channels_of(denoiser.config), rows, columns
    return InitialNoise(seed, shape, str(dtype).removeprefix("torch."), family.noise_patches)
