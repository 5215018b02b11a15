"""SD3 against golden records and diffusers' own pipeline: prompts, pictures, one pass, a whole trajectory, adapters."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file
from torch.nn import functional as F

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading
from diffalign.backbones.families import denoiser_of
from diffalign.backbones.repeated_text import repeats_text
from diffalign.denoising import add_noise, errors, guided, target
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError
from diffalign.evaluation import generate
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb
from tests.tiny import build_tiny_sd3

RECORDS = golden.load("flow_sd3")
PROMPTS = [PROMPT, "", "a cat, on the photo! " * 30]


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory):
    return build_tiny_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3-clip", t5=False)


@pytest.fixture
def backbone(tiny_sd3):
    return backbones.load(tiny_sd3)


@pytest.fixture(scope="module")
def network():
    """Return the transformer of the records, its weights a formula."""
    return golden.network(SD3Transformer2DModel, RECORDS["backbone_sd3"])


def _cond(text, pooled):
    return Conditioning(
        {"prompt_embeds": golden.fill((2, 7, 32), text), "pooled_prompt_embeds": golden.fill((2, 64), pooled)}
    )


class TestGoldens:
    def test_one_pass_and_its_error(self, backbone, network):
        record, path = RECORDS["backbone_sd3"], backbone.path
        x0, noise = golden.fill((2, 16, 8, 8), 1000), golden.fill((2, 16, 8, 8), 1001, 1.5)
        timesteps = 1000 * torch.tensor(record["inputs"]["s"])
        problem = with_noise(path, x0, noise, timesteps)
        torch.testing.assert_close(problem.xt.flatten()[:4], torch.tensor(record["expected"]["x_s_first4"]))
        velocity = backbone.predict(network, problem.xt, problem.timesteps, _cond(1010, 1011))
        golden.assert_close(record, "velocity", velocity)
        error = errors(DenoisingOutputs(policy=velocity), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        golden.assert_close(record, "grad_norm_of_mean_error", norm)

    @pytest.mark.parametrize("kind", ["plain", "cfg"])
    @torch.no_grad()
    def test_three_steps_of_its_pipeline(self, backbone, network, kind):
        record = RECORDS["pipeline_sd3"]
        scale = record["hyperparameters"]["guidance"][kind]["guidance_scale"]
        x, sigmas = golden.fill((2, 16, 8, 8), 1001, 1.5), torch.tensor(record["expected"]["sigmas"])
        cond, empty = _cond(1010, 1011), _cond(1020, 1021)

        def velocity(xt, timesteps, cond):
            return backbone.predict(network, xt, timesteps, cond)

        for here, there in pairwise(sigmas):
            timesteps = (1000 * here).repeat(2)
            if kind == "plain":
                v = velocity(x, timesteps, cond)
            else:
                both = velocity(x, timesteps, empty), velocity(x, timesteps, cond)
                v = both[0] + scale * (both[1] - both[0])
            x = x + (there - here) * v
        golden.assert_close(record, f"latents_{kind}", x)


@pytest.mark.parametrize("t5", [True, False])
def test_prompts_equal_the_pipeline(tiny_sd3, without_t5, t5):
    folder, absent = (tiny_sd3, {}) if t5 else (without_t5, {"text_encoder_3": None, "tokenizer_3": None})
    pipeline, backbone = StableDiffusion3Pipeline.from_pretrained(folder, **absent), backbones.load(folder)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False
        )
        text = backbone.encode_prompts(PROMPTS)
    assert embeds.shape == (3, 77 + 256, 32)
    kept = text["prompt_embeds"]
    assert torch.equal(kept, embeds if t5 else embeds[:, :78])
    assert bool(embeds[:, 77:].any()) is t5
    assert torch.equal(text["pooled_prompt_embeds"], pooled)
    if t5:
        assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)


@pytest.mark.parametrize("foreign", [False, True])
def test_one_zero_stands_for_the_256_in_the_place_of_t5(without_t5, foreign):
    backbone = backbones.load(without_t5)
    network = backbone.denoiser
    if foreign:  # what does not understand repeats gets all 256
        network.set_attn_processor(type("Foreign", (JointAttnProcessor2_0,), {})())
    text = backbone.encode_prompts(PROMPTS)
    xt, timesteps = (
        torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(2)),
        torch.tensor([9.0, 500, 990]),
    )
    long = F.pad(text["prompt_embeds"], (0, 0, 0, 255))
    inputs = {"encoder_hidden_states": long, "pooled_projections": text["pooled_prompt_embeds"]}
    expected = network(xt, timestep=timesteps, **inputs).sample
    lengths = []
    hook = network.context_embedder.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    found = backbone.predict(network, xt, timesteps, backbone.condition(text, None))
    hook.remove()
    assert lengths == [77 + (256 if foreign else 1)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted, got = (_all_gradients(network, v) for v in (expected, found))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_pictures_without_t5_equal_those_of_the_stock_pipeline(without_t5):
    stock = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
    ours = backbones.load(without_t5).pipeline()
    drawn = [
        np.stack(
            [np.asarray(image, dtype=float) for image in generate(each, [PROMPT, "a cat"], [3, 4], progress=False)]
        )
        for each in (stock, ours)
    ]
    assert repeats_text(ours.transformer)
    assert not repeats_text(stock.transformer)
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def _all_gradients(network, v):
    loss = v.square().mean()
    named = dict(network.requires_grad_(True).named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: part for name, part in zip(named, found, strict=True) if part is not None}


def test_a_missing_t5_is_said(without_t5, caplog):
    backbones.load(without_t5)
    assert "has no T5 (text_encoder_3): zeros take the place" in caplog.text


@torch.no_grad()
def test_a_whole_trajectory_equals_the_stock_pipeline(tiny_sd3, backbone):
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    prompts = [PROMPT, "a cat"]
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
    expected = stock(prompts, latents=noise, **settings).images

    cond = backbone.condition(backbone.encode_prompts(prompts), None)
    empty = backbone.condition(backbone.encode_prompts([""]), None)
    x = noise
    for here, there in pairwise(stock.scheduler.sigmas):

        def velocity(xt, timesteps, cond):
            return backbone.predict(backbone.denoiser, xt, timesteps, cond)

        x = x + (there - here) * guided(velocity, x, (1000 * here).repeat(2), cond, empty, 4.0)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


def test_pictures_are_shifted_and_scaled_as_the_pipeline_decodes_them(backbone):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = backbone.encode_images(images)
    with torch.no_grad():
        posterior = backbone.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(std, posterior.std * 1.5305)
    assert mean.shape == (2, 16, 16, 16)


def _gradients(backbone, names):
    x0 = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    noise, times = torch.randn(x0.shape, generator=torch.Generator().manual_seed(6)), torch.tensor([300.0, 800.5])
    cond = backbone.condition(backbone.encode_prompts(["a cat", PROMPT]), None)
    xt, wanted = add_noise(backbone.path, x0, noise, times), target(backbone.path, x0, noise, times)
    loss = (backbone.predict(backbone.denoiser, xt, times, cond) - wanted).square().mean()
    parameters = {name: p for name, p in backbone.denoiser.named_parameters() if p.requires_grad and names in name}
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {name: gradient.abs().max().item() for name, gradient in zip(parameters, found, strict=True)}


class TestAdapters:
    def test_every_one_learns_and_none_lies_where_nothing_is_read(self, backbone):
        denoiser = backbone.denoiser
        idle = backbone.idle_layers(denoiser)
        assert idle == ("transformer_blocks.1.attn.add_q_proj",)
        adapters.add_lora(denoiser, 2, target_modules=backbone.lora_targets, idle=idle)
        moved = _gradients(backbone, "lora_B")
        assert len(moved) == 8 + 4 + 6  # attn and attn2 of one block; the last has no to_add_out and an idle query
        assert min(moved.values()) > 0

    def test_the_idle_layer_indeed_learns_nothing(self, backbone):
        adapters.add_lora(backbone.denoiser, 2, target_modules=["add_q_proj"])
        moved = _gradients(backbone, "lora_B")
        assert moved["transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"] == 0
        assert moved["transformer_blocks.0.attn.add_q_proj.lora_B.default.weight"] > 0

    def test_blocks_of_a_unet_are_refused(self, backbone):
        with pytest.raises(ModelError, match="names parts of a UNet; a SD3Transformer2DModel has none"):
            adapters.add_lora(backbone.denoiser, 2, blocks=["mid", "up"])


class TestExport:
    def _trained(self, backbone):
        denoiser = backbone.denoiser
        idle = backbone.idle_layers(denoiser)
        perturb(adapters.add_lora(denoiser, 4, alpha=8, target_modules=backbone.lora_targets, idle=idle), scale=0.2)
        return backbone

    def test_a_lora_draws_the_same_in_the_stock_pipeline(self, tiny_sd3, backbone, tmp_path, recwarn):
        file = export.save_lora(self._trained(backbone).denoiser, tmp_path, "some/base")
        assert all(name.startswith("transformer.transformer_blocks.") for name in load_file(file))
        stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(tiny_sd3).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]

    def test_a_whole_transformer_takes_the_place_of_the_base(self, tiny_sd3, backbone, tmp_path):
        perturb(backbone.denoiser.parameters(), scale=0.02)
        assert export.save_denoiser(backbone.denoiser, tmp_path) == tmp_path / "transformer"
        stock = StableDiffusion3Pipeline.from_pretrained(
            tiny_sd3, transformer=SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
        )
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-6)
        loaded = export.load_adapter_into(loading.load(tiny_sd3).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        continued = backbones.load(tiny_sd3, unet_init=tmp_path)
        assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()

    def test_loras_of_other_kinds_of_networks_are_told_apart(self, tiny_sdxl, tiny_sd3, backbone, tmp_path):
        unet = backbones.load(tiny_sdxl).denoiser
        adapters.add_lora(unet, 2)
        export.save_lora(unet, tmp_path / "sdxl")
        export.save_kohya_lora(unet, tmp_path / "kohya.safetensors")
        export.save_lora(self._trained(backbone).denoiser, tmp_path / "sd3")
        pipeline = loading.load(tiny_sd3).pipeline()
        for place in ("sdxl", "kohya.safetensors"):
            with pytest.raises(ModelError, match=r"adapts a UNet.*StableDiffusion3Pipeline has a transformer"):
                export.load_adapter_into(pipeline, tmp_path / place)
        with pytest.raises(ModelError, match=r"adapts a transformer.*StableDiffusionXLPipeline has a UNet"):
            export.load_adapter_into(loading.load(tiny_sdxl).pipeline(), tmp_path / "sd3")
        assert not adapters.has_adapters(denoiser_of(pipeline))


class TestWhatCannotBeTrained:
    @pytest.fixture
    def empty(self, tiny_sd3, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(tiny_sd3, tmp_path / "sd3.5-medium")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    @pytest.mark.parametrize("name", ["stable-diffusion-3.5-large-turbo", "SD3-Flash", "sd3-lightning-4step"])
    def test_few_step_models(self, empty, name):
        folder = empty.rename(empty.parent / name)
        for refuse in (inspection.check, loading.load):
            arguments = {"resolution": 64}
            with pytest.raises(ModelError, match=r"distilled to draw in a few steps.*would undo that"):
                refuse(str(folder), **arguments)

    def test_few_step_models_of_the_hub_by_their_name(self):
        with pytest.raises(ModelError, match="distilled to draw in a few steps"):
            inspection.check("stabilityai/stable-diffusion-3.5-large-turbo", 1024)
        inspection.check("stabilityai/stable-diffusion-3.5-large", 1024)
        inspection.check("stabilityai/sdxl-turbo", 512)  # a UNet

    @pytest.mark.parametrize(
        ("resolution", "message"), [(60, "multiples of 8 for this model, got 60x60"), (256, "of up to 128 pixels")]
    )
    def test_resolutions(self, empty, resolution, message):
        with pytest.raises(ModelError, match=message):
            loading.load(empty, resolution=resolution)

    def test_half_a_t5(self, tiny_sd3, tmp_path):
        copy = shutil.copytree(tiny_sd3, tmp_path / "copy")
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"tokenizer_3": [None, None]}))
        with pytest.raises(ModelError, match="3 text encoders and 2 tokenizers"):
            backbones.load(copy)

    def test_a_scheduler_of_another_path(self, tiny_sd3, tmp_path):
        copy = shutil.copytree(tiny_sd3, tmp_path / "copy")
        file = copy / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}))
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
        with pytest.raises(ModelError, match="is not one of flow matching"):
            backbones.load(copy)
