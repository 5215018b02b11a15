"""Every family against diffusers' own pipeline: prompts, images, micro-conditioning, prediction."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign import backbones
from diffalign.errors import ModelError
from tests.backbones.drawing import draw
from tests.tiny import build_tiny_sdxl

PROMPTS = ["a red circle on a blue background", "", "a cat, on the photo! " * 30]
POOLED = {"pooled_prompt_embeds": torch.zeros(3, 32)}
SIZES = torch.tensor([[1001, 667, 3, 5, 64, 64], [64, 64, 0, 0, 64, 64], [512, 384, 0, 64, 64, 64]])


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def backbone(folder):
    return backbones.load(folder)


def _condition(backbone):
    return backbone.condition(backbone.encode_prompts(PROMPTS), SIZES)


def _latents(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def test_encode_prompts_equals_the_pipeline(backbone, folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        expected = pipeline.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    prompt_embeds = text["prompt_embeds"]
    assert torch.equal(prompt_embeds, expected[0])
    assert prompt_embeds.shape[1] == 77
    if backbone.family == "sdxl":
        assert torch.equal(text["pooled_prompt_embeds"], expected[2])
    assert not torch.equal(prompt_embeds[0], prompt_embeds[1])
    assert not prompt_embeds.requires_grad


def test_encode_images_scales_the_posterior(backbone):
    images = torch.rand(2, 3, 64, 64)
    mean, std = backbone.encode_images(images)
    with torch.no_grad():
        posterior = backbone.vae.encode(images * 2 - 1).latent_dist
    factor = {"sd15": 0.18215, "sdxl": 0.13025}[backbone.family]
    assert mean.shape == std.shape == (2, backbone.latent_channels, 16, 16)
    assert backbone.vae_scale_factor == 4
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(std, posterior.std * factor)


def test_a_shift_moves_the_mean_and_not_the_std(backbone):
    images = torch.rand(2, 3, 64, 64)
    mean, std = backbone.encode_images(images)
    decoded = backbone.decode_latents(mean)
    backbone.vae.register_to_config(shift_factor=0.5)
    shifted_mean, shifted_std = backbone.encode_images(images)
    torch.testing.assert_close(shifted_mean, mean - 0.5 * backbone.vae.config.scaling_factor)
    assert torch.equal(shifted_std, std)
    torch.testing.assert_close(backbone.decode_latents(shifted_mean), decoded)


def test_decode_equals_the_pipelines_decoding(backbone, folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    captured = {}
    pipeline.scheduler.register_to_config()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64}
    for output_type in ("latent", "pt"):
        generator = torch.Generator().manual_seed(0)
        captured[output_type] = pipeline(PROMPTS[0], output_type=output_type, generator=generator, **options).images
    torch.testing.assert_close(backbone.decode_latents(captured["latent"]), captured["pt"])


def test_decoding_is_differentiable(backbone):
    x0 = _latents(1).requires_grad_()
    backbone.decode_latents(x0).sum().backward()
    assert x0.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.vae.parameters())


def test_float16_vae_marked_force_upcast_runs_in_float32(tiny_sdxl):
    backbone = backbones.load(tiny_sdxl, torch_dtype=torch.float16)
    exact = backbones.load(tiny_sdxl)
    exact.vae.load_state_dict(backbone.vae.float().state_dict())
    backbone.vae.half()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(backbone.encode_images(images)[0], exact.encode_images(images)[0])
    assert backbone.vae.dtype == torch.float16


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 64, 66)])
def test_wrong_images_are_refused(backbone, shape):
    with pytest.raises(ModelError, match=str(shape[-1])):
        backbone.encode_images(torch.rand(shape))


def test_time_ids_equal_the_pipelines(tiny_sdxl):
    backbone = backbones.load(tiny_sdxl)
    pipeline = backbone.pipeline()
    for row, got in zip(SIZES.tolist(), _condition(backbone)["add_time_ids"], strict=True):
        expected = pipeline._get_add_time_ids(
            tuple(row[:2]), tuple(row[2:4]), tuple(row[4:]), dtype=torch.float32, text_encoder_projection_dim=32
        )
        assert torch.equal(got, expected[0])


@pytest.mark.parametrize(
    ("pooled", "sizes", "named"),
    [({}, SIZES, "pooled_prompt_embeds"), (POOLED, SIZES[:2], r"\[2, 6\]"), (POOLED, None, "None")],
)
def test_sdxl_refuses_incomplete_conditioning(tiny_sdxl, pooled, sizes, named):
    with pytest.raises(ModelError, match=named):
        backbones.load(tiny_sdxl).condition({"prompt_embeds": torch.zeros(3, 77, 48), **pooled}, sizes)


def test_predict_is_deterministic_and_examples_do_not_mix(backbone):
    cond, xt, timesteps = _condition(backbone), _latents(), torch.tensor([10, 500, 990])
    with torch.no_grad():
        pred = backbone.predict(backbone.denoiser, xt, timesteps, cond)
        again = backbone.predict(backbone.denoiser, xt, timesteps, cond)
        alone = backbone.predict(backbone.denoiser, xt[1:2], timesteps[1:2], cond.select([1]))
    assert pred.shape == xt.shape
    assert torch.equal(pred, again)
    torch.testing.assert_close(alone, pred[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pred[0], pred[1], atol=1e-2)


def test_every_part_of_the_conditioning_reaches_the_network(backbone):
    cond, xt, timesteps = _condition(backbone), _latents(), torch.tensor([10, 500, 990])

    def pred(**changes):
        with torch.no_grad():
            told = backbones.Conditioning({**cond.columns, **changes})
            return backbone.predict(backbone.denoiser, xt, timesteps, told)

    base = pred()
    assert set(cond.columns) >= set(backbone.text_columns)
    assert ("add_time_ids" in cond.columns) == (backbone.family == "sdxl")
    for name in cond.columns:
        assert not torch.equal(pred(**{name: cond[name].flip(0)}), base)


def test_predict_follows_the_denoisers_dtype(folder):
    backbone = backbones.load(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        pred = backbone.predict(backbone.denoiser, _latents(), torch.tensor([10, 500, 990]), _condition(backbone))
    assert pred.dtype == torch.bfloat16


def test_pipeline_shares_the_modules_and_draws_what_the_folder_draws(backbone, folder):
    pipeline = backbone.pipeline()
    assert pipeline.unet is backbone.denoiser
    assert pipeline.vae is backbone.vae
    assert pipeline.scheduler is not backbone.scheduler
    assert torch.equal(draw(pipeline), draw(DiffusionPipeline.from_pretrained(folder)))


def test_pipeline_draws_in_bfloat16(folder):
    image = draw(backbones.load(folder, torch_dtype=torch.bfloat16).pipeline())
    assert image.isfinite().all()


def test_encoders_are_frozen_and_the_denoiser_is_not(backbone):
    for module in (backbone.vae, *backbone.text_encoders):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in backbone.denoiser.parameters())


def test_fingerprint_sees_encoders_only(backbone, folder, tmp_path):
    same = backbones.load(folder)
    assert backbone.fingerprint() == same.fingerprint()
    assert backbone.denoiser_fingerprint() == same.denoiser_fingerprint()
    same.encode_prompts(["a cat"])  # sets padding inside the tokenizer
    with torch.no_grad():
        same.denoiser.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert backbone.fingerprint() == same.fingerprint()
    assert backbone.denoiser_fingerprint() != same.denoiser_fingerprint()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scaling"])
def test_fingerprint_sees_every_encoder_part(tiny_sdxl, part):
    backbone = backbones.load(tiny_sdxl)
    with torch.no_grad():
        if part == "vae":
            backbone.vae.decoder.conv_out.bias[0] += 1e-4
        elif part == "text_encoder":
            backbone.text_encoders[1].text_projection.weight[0, 0] += 1e-4
        elif part == "tokenizer":
            backbone.tokenizers[1].add_tokens(["zebra"])
        else:
            backbone.vae.register_to_config(scaling_factor=0.13)
    assert backbone.fingerprint() != backbones.load(tiny_sdxl).fingerprint()


def test_fingerprint_depends_on_the_encoders_dtype(tiny_sdxl):
    backbone = backbones.load(tiny_sdxl)
    before = backbone.fingerprint()
    backbone.to(encoder_dtype=torch.bfloat16, denoiser_dtype=torch.float32)
    assert backbone.vae.dtype == backbone.text_encoders[0].dtype == torch.bfloat16
    assert backbone.denoiser.dtype == torch.float32
    assert backbone.fingerprint() != before


def test_inpainting_unet_is_refused(tmp_path):
    folder = build_tiny_sdxl(tmp_path / "inpaint")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    config = dict(pipeline.unet.config) | {"in_channels": 9}
    shutil.rmtree(folder / "unet")
    type(pipeline.unet).from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="9 channels"):
        backbones.load(folder)
