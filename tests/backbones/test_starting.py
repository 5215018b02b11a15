"""The noise a picture starts from, drawn again from a line of text: bit for bit what the stock pipeline draws."""

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.backbones.families import denoiser_of, pipeline_kind
from diffalign.backbones.packing import packed
from diffalign.backbones.starting import initial_noise
from diffalign.denoising import InitialNoise

FLUX2 = ("tiny_klein", "tiny_flux2_dev")
PACKED = ("tiny_flux", "tiny_qwen", *FLUX2)


@pytest.mark.parametrize(
    "name", ["tiny_sd15", "tiny_sdxl", "tiny_sd3", "tiny_zimage", "tiny_lumina2", "tiny_sana", *PACKED]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_pipeline_starts_from_it(name, dtype, request, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(name), torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    started = []
    prepare = pipeline.prepare_latents

    def watched(*arguments, **named):
        result = prepare(*arguments, **named)
        started.append(result[0] if isinstance(result, tuple) else result)
        return result

    monkeypatch.setattr(pipeline, "prepare_latents", watched)
    options = pipeline_kind(pipeline).drawing_options(pipeline)
    for height, width in ((64, 64), (64, 96)):
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        size = {"height": height, "width": width}
        pipeline(
            prompt=["a red circle"] * 2,
            num_inference_steps=2,
            generator=generators,
            output_type="latent",
            **size,
            **options,
        )
        latents = started.pop()
        said = [str(initial_noise(pipeline, seed, height, width)) for seed in (7, 8)]
        noise = torch.stack([InitialNoise.parse(text).draw() for text in said])
        factor = pipeline.vae_scale_factor
        assert noise.shape[2:] == (height // factor, width // factor)
        assert f"dtype={str(latents.dtype).removeprefix('torch.')}" in said[0]
        scale = pipeline.scheduler.init_noise_sigma if name in ("tiny_sd15", "tiny_sdxl") else 1.0
        expected = packed(noise) if name in PACKED else noise
        assert ("patches=2" in said[0]) == (name in FLUX2)
        assert torch.equal((expected.to(latents.dtype) * scale).float(), latents.float())
        assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("name", ["tiny_sd15", "tiny_sdxl", "tiny_sd3"])
def test_without_a_size_it_is_the_one_the_denoiser_was_made_for(name, request):
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(name))
    channels = denoiser_of(pipeline).config.in_channels
    assert initial_noise(pipeline, 0).shape == (channels, 16, 16)


@pytest.mark.parametrize("name", ["tiny_flux", "tiny_zimage"])
def test_flux_and_z_image_draw_at_their_published_size(name, request):
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(name))
    side = {"tiny_flux": 128, "tiny_zimage": 1024 // 4}[name]  # FLUX: 128 latents; Z-Image: 1024 pixels
    assert initial_noise(pipeline, 0).shape == (16, side, side)
