"""The embedded flow model: a real pipeline that draws, loads as a backbone, and learns by the same loop as SDXL's."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from rich.console import Console

from diffalign.backbones import loading
from diffalign.shapes import pretraining
from diffalign.shapes.pipeline import RESOLUTION
from diffalign.shapes.pretraining import Pretraining, TextToLatent
from diffalign.shapes.sd3 import LATENT_CHANNELS, build_pipeline

CAPTION = "a red circle on a blue background"
RECIPE = Pretraining(
    images=24,
    vae_steps=10,
    vae_batch_size=8,
    denoiser_steps=12,
    denoiser_batch_size=8,
    denoiser_learning_rate=2e-3,
    ema_decay=0.5,
)


@pytest.mark.parametrize("t5", [False, True])
def test_it_is_a_real_sd3_pipeline_that_loads_as_a_backbone(t5, tmp_path):
    pipeline = build_pipeline(0, t5=t5)
    pipeline.save_pretrained(tmp_path / "tiny")
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").rglob("*")) < 20e6 or t5
    backbone = loading.load(tmp_path / "tiny")
    assert (backbone.family, len(backbone.text_encoders)) == ("sd3", 3 if t5 else 2)
    assert backbone.denoiser.config.sample_size * backbone.vae_scale_factor == RESOLUTION
    with torch.no_grad():
        text = backbone.encode_prompts([CAPTION])
        embeds, _, pooled, _ = pipeline.encode_prompt(CAPTION, CAPTION, CAPTION, do_classifier_free_guidance=False)
    kept = text["prompt_embeds"]
    torch.testing.assert_close(kept, embeds[:, : kept.shape[1]])
    assert not embeds[:, kept.shape[1] :].any()  # in the place of T5
    torch.testing.assert_close(text["pooled_prompt_embeds"], pooled)
    if t5:
        words = backbone.tokenizers[2]([CAPTION]).input_ids[0]
        assert len(words) == len(CAPTION.split()) + 1  # a token a word, and the end
        assert backbone.tokenizers[2].unk_token_id not in words


def _error(pipeline, x0, captions):
    model = TextToLatent(pipeline).eval()
    xt, wanted, timesteps = pretraining._noised(model.backbone, x0, torch.Generator().manual_seed(9))
    with torch.no_grad():
        return (model(xt, timesteps, captions) - wanted).square().mean().item()


def test_a_few_steps_lower_both_errors():
    pipeline, console = build_pipeline(0), Console(quiet=True)
    assert type(pipeline) is StableDiffusion3Pipeline
    images, captions = pretraining.render_dataset(RECIPE.images, RECIPE.seed)
    pretraining.train_vae(pipeline, images, RECIPE, console)
    config = pipeline.vae.config
    x0 = (pretraining.encode(pipeline, images) - config.shift_factor) * config.scaling_factor
    assert x0.shape == (RECIPE.images, LATENT_CHANNELS, 16, 16)
    assert x0.mean().item() == pytest.approx(0.0, abs=1e-2)
    assert x0.std().item() == pytest.approx(1.0, abs=1e-2)
    before = _error(pipeline, x0, captions)
    encoder = pipeline.text_encoder_2.text_model.embeddings.token_embedding.weight.clone()
    pretraining.train_denoiser(pipeline, x0, captions, RECIPE, console)
    assert _error(pipeline, x0, captions) < 0.9 * before
    assert not torch.equal(pipeline.text_encoder_2.text_model.embeddings.token_embedding.weight, encoder)
    assert not pipeline.transformer.training
