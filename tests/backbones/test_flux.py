"""FLUX.1 against golden records and diffusers' own pipeline: packing, prompts, a pass, a trajectory, adapters."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading, packing
from diffalign.denoising import add_noise, errors, target
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError, UserError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb
from tests.tiny import build_tiny_flux

RECORDS = golden.load("flow_flux")
PROMPTS = [PROMPT, "", "a cat, on the photo! " * 60]
STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False}


@pytest.fixture(scope="module")
def without_guidance(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux", guidance_embeds=False)


@pytest.fixture
def backbone(tiny_flux):
    return backbones.load(tiny_flux)


@pytest.fixture(scope="module")
def network():
    """Return the transformer of the records, its weights a formula."""
    return golden.network(FluxTransformer2DModel, RECORDS["backbone_flux"])


def _cond(text, pooled):
    return Conditioning(
        {"prompt_embeds": golden.fill((2, 7, 32), text), "pooled_prompt_embeds": golden.fill((2, 32), pooled)}
    )


class TestGoldens:
    @pytest.mark.parametrize("name", ["pack_flux_qwen_1x2x4x6", "pack_flux_qwen_2x1x2x4"])
    def test_packing(self, name):
        record = RECORDS[name]
        shape = record["hyperparameters"]["shape"]
        latents = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
        tokens = packing.packed(latents)
        golden.assert_close(record, "packed", tokens)
        golden.assert_close(record, "image_ids", packing.image_ids(*shape[2:]))
        assert torch.equal(packing.unpacked(tokens, *shape[2:]), latents)

    def test_one_pass_and_its_error(self, backbone, network):
        record, path = RECORDS["backbone_flux"], backbone.path
        backbone.guidance = record["hyperparameters"]["guidance"]
        x0, noise = golden.fill((2, 16, 8, 8), 1000), golden.fill((2, 16, 8, 8), 1001, 1.5)
        problem = with_noise(path, x0, noise, 1000 * torch.tensor(record["inputs"]["s"]))
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
        record = RECORDS["pipeline_flux"]
        backbone.guidance = RECORDS["backbone_flux"]["hyperparameters"]["guidance"]
        scale = record["hyperparameters"]["guidance"][kind]["true_cfg_scale"]
        x, sigmas = golden.fill((2, 16, 8, 8), 1001, 1.5), torch.tensor(record["expected"]["sigmas"])
        cond, empty = _cond(1010, 1011), _cond(1020, 1021)
        for here, there in pairwise(sigmas):
            timesteps = (1000 * here).repeat(2)
            v = backbone.predict(network, x, timesteps, cond)
            if kind == "cfg":
                v_empty = backbone.predict(network, x, timesteps, empty)
                v = v_empty + scale * (v - v_empty)
            x = x + (there - here) * v
        golden.assert_close(record, f"latents_{kind}", x)


def test_prompts_equal_the_pipeline(tiny_flux, backbone):
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, device="cpu")
        text = backbone.encode_prompts(PROMPTS)
    assert torch.equal(text["prompt_embeds"], embeds)
    assert torch.equal(text["pooled_prompt_embeds"], pooled)
    assert embeds.shape == (3, 512, 32)
    assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.5, None])
def test_a_whole_trajectory_equals_the_stock_pipeline(tiny_flux, without_guidance, guidance):
    folder = without_guidance if guidance is None else tiny_flux
    stock, backbone = FluxPipeline.from_pretrained(folder), backbones.load(folder)
    assert backbone.guidance == 1.0
    if guidance is not None:
        backbone.guidance = guidance
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 12, 16, generator=torch.Generator().manual_seed(3))
    prompts = [PROMPT, "a cat"]
    settings = {"num_inference_steps": 5, "guidance_scale": guidance or 3.5, "height": 48, "width": 64}
    expected = stock(prompts, latents=packing.packed(noise), output_type="pt", **settings).images

    cond, x = backbone.condition(backbone.encode_prompts(prompts), None), noise
    for here, there in pairwise(stock.scheduler.sigmas):
        x = x + (there - here) * backbone.predict(backbone.denoiser, x, (1000 * here).repeat(2), cond)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


def test_training_meets_the_levels_that_sampling_shifts_to(backbone):
    """The shift follows the tokens of the picture: 8 x 8 of them at 64 pixels of a VAE that halves twice."""
    stock = backbone.pipeline().scheduler
    mu = 0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256)
    stock.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=mu)
    shift = backbone.shift_at(64)
    assert [shift(level) for level in (1.0, 0.7, 0.2)] == pytest.approx(stock.sigmas[:3].tolist(), rel=1e-6)
    assert shift.mu == pytest.approx(mu)


def test_pictures_are_shifted_and_scaled_as_the_pipeline_decodes_them(backbone):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = backbone.encode_images(images)
    with torch.no_grad():
        posterior = backbone.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1159) * 0.3611)
    torch.testing.assert_close(std, posterior.std * 0.3611)
    assert mean.shape == (2, 16, 16, 16)


class TestAdapters:
    def _added(self, backbone, rank, **settings):
        denoiser = backbone.denoiser
        idle = backbone.idle_layers(denoiser)
        return adapters.add_lora(denoiser, rank, target_modules=backbone.lora_targets, idle=idle, **settings)

    def test_every_one_learns_and_the_last_projection_has_none(self, backbone):
        self._added(backbone, 2)
        x0 = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(5))
        noise, times = torch.randn(x0.shape, generator=torch.Generator().manual_seed(6)), torch.tensor([300.0, 800.5])
        cond = backbone.condition(backbone.encode_prompts(["a cat", PROMPT]), None)
        xt, wanted = add_noise(backbone.path, x0, noise, times), target(backbone.path, x0, noise, times)
        loss = (backbone.predict(backbone.denoiser, xt, times, cond) - wanted).square().mean()
        learning = {name: p for name, p in backbone.denoiser.named_parameters() if "lora_B" in name}
        assert len(learning) == 8 + 2 * 5
        assert not any(name.startswith("proj_out") for name in learning)
        gradients = torch.autograd.grad(loss, list(learning.values()))
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_a_lora_draws_the_same_in_the_stock_pipeline(self, tiny_flux, backbone, tmp_path, recwarn):
        perturb(self._added(backbone, 4, alpha=8), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        names = load_file(file).keys()
        starts = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")
        assert {start for name in names for start in starts if name.startswith(start)} == set(starts)
        assert all(name.startswith(starts) for name in names)
        stock = FluxPipeline.from_pretrained(tiny_flux)
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(tiny_flux).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]

    def test_a_whole_transformer_takes_the_place_of_the_base(self, tiny_flux, backbone, tmp_path):
        perturb(backbone.denoiser.parameters(), scale=0.02)
        export.save_denoiser(backbone.denoiser, tmp_path)
        stock = FluxPipeline.from_pretrained(
            tiny_flux, transformer=FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
        )
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-6)
        loaded = export.load_adapter_into(loading.load(tiny_flux).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        continued = backbones.load(tiny_flux, unet_init=tmp_path)
        assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()

    def test_a_lora_of_another_transformer_is_refused(self, tiny_sd3, backbone, tmp_path):
        other = backbones.load(tiny_sd3)
        adapters.add_lora(other.denoiser, 2, target_modules=other.lora_targets)
        export.save_lora(other.denoiser, tmp_path)
        with pytest.raises(ModelError):
            export.load_adapter_into(backbone.pipeline(), tmp_path)


class TestGuidanceThatIsTold:
    def test_a_negative_prompt_has_no_effect_and_is_refused(self, backbone):
        settings = SamplingSettings(num_inference_steps=1, height=64, width=64, negative_prompt="a cat")
        with pytest.raises(UserError, match="negative prompt has no effect on its pictures"):
            generate(backbone.pipeline(), [PROMPT], [0], settings, progress=False)

    def test_there_is_no_branch_for_a_negative_network(self, backbone, tmp_path):
        with pytest.raises(ModelError, match="there is no branch for a negative network"):
            with_negative_branch(backbone.pipeline(), tmp_path)


class TestWhatCannotBeTrained:
    @pytest.fixture
    def empty(self, tiny_flux, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(tiny_flux, tmp_path / "flux-dev")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    def _is_schnell(self, folder, changes):
        config = json.loads((folder / "transformer" / "config.json").read_text())
        (folder / "transformer" / "config.json").write_text(json.dumps(config | {"guidance_embeds": False}))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(STATIC | changes))

    def test_schnell_under_another_name(self, empty):
        self._is_schnell(empty, {})
        for refuse in (inspection.check, loading.load):
            with pytest.raises(ModelError, match=r"as FLUX.1-schnell has, which is distilled to draw in a few steps"):
                refuse(str(empty), resolution=64)

    def test_a_model_without_guidance_embedding_but_a_shift_can_be(self, empty):
        self._is_schnell(empty, {"use_dynamic_shifting": True})
        with pytest.raises(ModelError, match=r"\.safetensors") as caught:  # its weights, read last
            loading.load(str(empty), resolution=64)
        assert "few steps" not in str(caught.value)

    def test_few_step_models_by_their_names(self, empty):
        for name in ("black-forest-labs/FLUX.1-schnell", "someone/FLUX.1-Turbo-Alpha"):
            with pytest.raises(ModelError, match="distilled to draw in a few steps"):
                inspection.check(name, 1024)
        inspection.check("black-forest-labs/FLUX.1-dev", 1024)
        folder = empty.rename(empty.parent / "flux-schnell")
        with pytest.raises(ModelError, match='"schnell"'):
            loading.load(str(folder), resolution=64)

    def test_a_resolution_that_packing_does_not_divide(self, empty):
        with pytest.raises(ModelError, match="multiples of 8 for this model, got 60x60"):
            loading.load(empty, resolution=60)

    def test_a_transformer_of_other_latents(self, tiny_flux):
        parts = backbones.load(tiny_flux).pipeline()
        parts.transformer = FluxTransformer2DModel.from_config({**parts.transformer.config, "in_channels": 128})
        with pytest.raises(ModelError, match="takes 32 channels, the VAE makes 16"):
            backbones.load(tiny_flux).over(parts, "fill")
