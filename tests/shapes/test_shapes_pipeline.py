import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from rich.console import Console

from diffalign.backbones import loading
from diffalign.backbones.published import COMPONENTS
from diffalign.shapes import pretraining
from diffalign.shapes.captions import parse
from diffalign.shapes.pipeline import RESOLUTION, build_pipeline
from diffalign.shapes.pretraining import Pretraining, TextToLatent

RECIPE = Pretraining(
    images=48,
    vae_steps=30,
    vae_batch_size=8,
    denoiser_steps=24,
    denoiser_batch_size=8,
    denoiser_learning_rate=2e-3,
    ema_decay=0.5,
)


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


def test_the_noise_schedule_is_sdxls(pipeline):
    published = {k: v for k, v in COMPONENTS["sdxl"]["scheduler"][2].items() if k in pipeline.scheduler.config}
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert {key: pipeline.scheduler.config[key] for key in published} == published


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
    xt, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([400])
    with torch.no_grad():
        trained = TextToLatent(pipeline)(xt, timesteps, [prompt])
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        time_ids = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, 96)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        sampled = pipeline.unet(xt, timesteps, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(trained, sampled, rtol=1e-5, atol=1e-5)


def test_the_training_images_are_rendered_scenes_that_are_not_held_out():
    images, captions = pretraining.render_dataset(50, seed=0)
    assert images.shape == (50, 3, RESOLUTION, RESOLUTION)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.min() < -0.8
    assert images.max() > 0.8
    assert not any(parse(caption).held_out for caption in captions)
    again, same_captions = pretraining.render_dataset(50, seed=0)
    assert torch.equal(again, images)
    assert same_captions == captions


@torch.no_grad()
def reconstruction_error(pipeline, images: torch.Tensor) -> float:
    decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    return (decoded - images).square().mean().item()


@torch.no_grad()
def denoising_error(pipeline, x0: torch.Tensor, captions: list[str]) -> float:
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(x0.shape, generator=generator)
    timesteps = torch.randint(200, 1000, (len(x0),), generator=generator)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    xt = noising.add_noise(x0, noise, timesteps)
    pred = TextToLatent(pipeline).eval()(xt, timesteps, captions)
    return (pred - noise).square().mean().item()


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 39, 40, 1500])
def test_the_learning_rate_rises_and_falls_over_any_number_of_steps(steps):
    # torch's OneCycleLR divides by zero where its warm-up is exactly one step: 5 % of 20.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, rates = pretraining._schedule(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(rates) < steps else None
    assert max(rates) == pytest.approx(0.1) or steps == 1
    assert rates[-1] < 1e-4


def test_a_few_steps_lower_both_errors():
    pipeline, console = build_pipeline(0), Console(quiet=True)
    images, captions = pretraining.render_dataset(RECIPE.images, RECIPE.seed)
    before = reconstruction_error(pipeline, images)
    pretraining.train_vae(pipeline, images, RECIPE, console)
    assert reconstruction_error(pipeline, images) < 0.9 * before

    x0 = pretraining.encode(pipeline, images) * pipeline.vae.config.scaling_factor
    assert x0.shape == (RECIPE.images, 4, 16, 16)
    assert x0.std().item() == pytest.approx(1.0, abs=1e-2)
    before = denoising_error(pipeline, x0, captions)
    reported = pretraining.train_denoiser(pipeline, x0, captions, RECIPE, console)
    after = denoising_error(pipeline, x0, captions)
    assert after < 0.9 * before
    assert 0 < reported < 2
    assert not pipeline.unet.training
