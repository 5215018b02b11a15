import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from diffalign.backbones import loading
from diffalign.backbones.families import family_of
from diffalign.backbones.published import COMPONENTS
from diffalign.denoising import ends_in_noise
from diffalign.shapes.pipeline import LATENT_CHANNELS, RESOLUTION, build_pipeline
from diffalign.shapes.pretraining import TextToLatent


@pytest.fixture(scope="module")
def pipeline():
    built = build_pipeline(0)
    built.set_progress_bar_config(disable=True)
    return built


def draw(pipeline, prompt: str, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(prompt, num_inference_steps=2, generator=generator, height=RESOLUTION, width=RESOLUTION).images[0]
    return np.asarray(image)


def test_it_is_a_real_sdxl_pipeline_that_draws(pipeline):
    assert type(pipeline) is StableDiffusionXLPipeline
    image = draw(pipeline, "a red circle on a blue background")
    assert image.shape == (RESOLUTION, RESOLUTION, 3)
    assert image.std() > 1
    assert np.array_equal(draw(pipeline, "a red circle on a blue background"), image)
    assert not np.array_equal(draw(pipeline, "a red circle on a blue background", seed=1), image)
    assert not np.array_equal(draw(pipeline, "three yellow stars on a black background"), image)


def test_its_size_is_what_it_draws_by_default(pipeline):
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == RESOLUTION


def test_the_noise_schedule_is_sdxls_down_to_pure_noise(pipeline):
    published = {k: v for k, v in COMPONENTS["sdxl"]["scheduler"][2].items() if k in pipeline.scheduler.config}
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    differs = {key for key in published if pipeline.scheduler.config[key] != published[key]}
    assert differs <= {"prediction_type", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}
    path = family_of("StableDiffusionXLPipeline", "it").over(pipeline, "it").path
    assert path.prediction_type == "v_prediction"
    assert ends_in_noise(path)


def test_the_tokenizers_pad_as_sdxls_do(pipeline):
    published = [COMPONENTS["sdxl"][name][2]["pad_token"] for name in ("tokenizer", "tokenizer_2")]
    assert [pipeline.tokenizer.pad_token, pipeline.tokenizer_2.pad_token] == published


def test_the_seed_decides_about_the_weights(pipeline):
    same, other = build_pipeline(0), build_pipeline(1)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = torch.cat([p.flatten() for p in getattr(pipeline, name).parameters()])
        assert torch.equal(weights, torch.cat([p.flatten() for p in getattr(same, name).parameters()])), name
        assert not torch.equal(weights, torch.cat([p.flatten() for p in getattr(other, name).parameters()])), name


def test_it_loads_as_a_backbone_of_sdxl(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "tiny")
    backbone = loading.load(str(tmp_path / "tiny"))
    assert backbone.family == "sdxl"
    text = backbone.encode_prompts(["a red circle on a blue background"])
    direct = pipeline.encode_prompt("a red circle on a blue background", device="cpu", num_images_per_prompt=1)
    torch.testing.assert_close(text["prompt_embeds"], direct[0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text["pooled_prompt_embeds"], direct[2].detach(), rtol=1e-5, atol=1e-5)


def test_pretraining_predicts_as_the_pipeline_does(pipeline):
    """What is trained is the function that sampling and alignment evaluate."""
    prompt = "two pink crosses on a black background"
    xt, timesteps = torch.randn(1, LATENT_CHANNELS, 16, 16), torch.tensor([400])
    with torch.no_grad():
        trained = TextToLatent(pipeline)(xt, timesteps, [prompt])
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        time_ids = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 96)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        sampled = pipeline.unet(xt, timesteps, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(trained, sampled, rtol=1e-5, atol=1e-5)
