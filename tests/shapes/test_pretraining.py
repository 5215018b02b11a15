"""The embedded models learn: captions wrong for a known share, VAE, denoiser, and the models beside the base."""

import random
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from diffalign.shapes import autoencoder, pretraining
from diffalign.shapes.confusion import TAKEN_FOR, confuse
from diffalign.shapes.models import MODELS
from diffalign.shapes.pipeline import RESOLUTION
from diffalign.shapes.pretraining import Stage, TextToLatent
from diffalign.shapes.recipe import Pretraining

RECIPE = Pretraining(
    images=40,
    vae_steps=24,
    vae_batch_size=8,
    decoder_steps=30,
    decoder_learning_rate=1e-3,
    epsilon_steps=2,
    denoiser_steps=20,
    denoiser_batch_size=8,
    denoiser_learning_rate=2e-3,
    early_step=4,
    strong_steps=4,
    ema_decay=0.5,
)
QUIET = Console(quiet=True)


def test_the_training_images_are_rendered_scenes_that_are_not_held_out():
    images, drawn = pretraining.render_dataset(50, seed=0)
    assert images.shape == (50, 3, RESOLUTION, RESOLUTION)
    assert -1 <= images.min() < -0.8
    assert 0.8 < images.max() <= 1
    assert not any(scene.held_out for scene in drawn)
    again, same = pretraining.render_dataset(50, seed=0)
    assert torch.equal(again, images)
    assert same == drawn


def test_captions_are_wrong_for_the_share_asked_for_and_never_name_a_held_out_combination():
    _, drawn = pretraining.render_dataset(2000, seed=0)
    assert pretraining.told(drawn, 0.0, seed=1) == [scene.caption() for scene in drawn]
    rng, share = random.Random(1), 0.3
    pairs = [(scene, confuse(scene, rng, share)) for scene in drawn]
    for name, least in (("background", 0.15), ("color", 0.17), ("count", 0.2)):
        mentioned = [pair for pair in pairs if getattr(pair[0], name) in TAKEN_FOR[name]]
        wrong = [told for scene, told in mentioned if getattr(told, name) != getattr(scene, name)]
        assert least < len(wrong) / len(mentioned) < share + 0.04, name
    assert not any(told.held_out or told.color == told.background for _, told in pairs)
    assert sum(confuse(scene, random.Random(2), 1.0) != scene for scene in drawn[:100]) > 90
    assert all(told.shape == scene.shape for scene, told in pairs)


@pytest.mark.parametrize("steps", [1, 3, 10, 20, 39, 40, 1500])
def test_the_learning_rate_rises_and_falls_over_any_number_of_steps(steps):
    # torch's OneCycleLR divides by zero where its warm-up is exactly one step: 5 % of 20.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, rates = autoencoder.one_cycle(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(rates) < steps else None
    assert max(rates) == pytest.approx(0.1) or steps == 1
    assert rates[-1] < 1e-4


def _error(pipeline, x0, captions):
    model = TextToLatent(pipeline).eval()
    xt, wanted, timesteps = pretraining._noised(model.backbone, x0, torch.Generator().manual_seed(9))
    with torch.no_grad():
        return (model(xt, timesteps, captions) - wanted).square().mean().item()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_few_steps_lower_the_errors_of_every_part(name):
    pipeline, recipe = MODELS[name].build(0), replace(RECIPE, denoiser_bf16=MODELS[name].recipe.denoiser_bf16)
    images, drawn = pretraining.render_dataset(recipe.images, recipe.seed)
    captions, vae = [scene.caption() for scene in drawn], pipeline.vae
    before = autoencoder.reconstruction_psnr(vae, images)
    autoencoder.train_vae(vae, images, recipe, QUIET)
    together = autoencoder.reconstruction_psnr(vae, images)
    assert together > before + 0.4

    x0 = pretraining.scaled_latents(vae, images)
    assert x0.shape == (recipe.images, vae.config.latent_channels, 16, 16)
    assert x0.std().item() == pytest.approx(1.0, abs=1e-2)
    autoencoder.train_decoder(vae, images, recipe, QUIET)
    torch.testing.assert_close(pretraining.scaled_latents(vae, images), x0)  # the latents are settled
    assert autoencoder.reconstruction_psnr(vae, images) > together

    before = _error(pipeline, x0, captions)
    encoder = pipeline.text_encoder_2.text_model.embeddings.token_embedding.weight.clone()
    stage = Stage(captions, 20, 2e-3, 0)
    reported, early = pretraining.train_denoiser(pipeline, x0, recipe, QUIET, stage)
    assert 0 < reported < 2
    after = _error(pipeline, x0, captions)
    assert after < 0.9 * before
    assert not torch.equal(pipeline.text_encoder_2.text_model.embeddings.token_embedding.weight, encoder)
    assert not TextToLatent(pipeline).denoiser.training
    TextToLatent(pipeline).load_state_dict(early)
    assert after < _error(pipeline, x0, captions) < before


def test_the_whole_training_keeps_an_early_a_base_and_a_strong_model():
    pipeline, kept = MODELS["sdxl"].build(0), {}

    def keep(kind):
        kept[kind] = pipeline.unet.conv_out.weight.clone()

    errors = pretraining.pretrain(
        pipeline, replace(RECIPE, vae_steps=2, decoder_steps=2, denoiser_steps=6), QUIET, keep
    )
    assert list(kept) == ["early", "base", "strong"]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert not torch.equal(kept["early"], kept["base"])
    assert not torch.equal(kept["base"], kept["strong"])
    assert list(errors) == ["vae_error", "decoder_error", "epsilon_error", "denoising_error", "strong_error"]
