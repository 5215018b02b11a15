"""FLUX.2 against golden records and diffusers' own pipelines: packing, prompts, a pass, a trajectory, adapters."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading, packing
from diffalign.denoising import add_noise, errors, guided, target
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError, UserError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb
from tests.tiny import build_tiny_klein

RECORDS = golden.load("flow_flux2")
PROMPTS = [PROMPT, "", "a [IMG] cat, on the photo! " * 60]
GUIDED = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 4.0}
LAYERS = 2 * 12 + 2 * 2  # that can be adapted, in two blocks of two streams and two of one


@pytest.fixture
def backbone(tiny_klein):
    return backbones.load(tiny_klein)


@pytest.fixture(scope="module")
def network():
    """Return the transformer of the records, its weights a formula."""
    return golden.network(Flux2Transformer2DModel, RECORDS["backbone_flux2"])


def _cond(text):
    return Conditioning({"prompt_embeds": golden.fill((2, 7, 24), text)})


def _noise(height=16, width=16):
    return torch.randn(2, 32, height, width, generator=torch.Generator().manual_seed(3))


def _patches(latents):
    """Return latents [N,C,h,w] as the pipelines hold them, [N,4C,h/2,w/2]."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    return packing.packed(latents).transpose(1, 2).unflatten(2, (height, width))


def _told(backbone, prompts):
    with torch.no_grad():
        return backbone.condition(backbone.encode_prompts(prompts), None)


class TestGoldens:
    @pytest.mark.parametrize("name", ["pack_flux2_1x2x4x6", "pack_flux2_2x1x2x4"])
    def test_packing(self, name):
        record = RECORDS[name]
        shape = record["hyperparameters"]["shape"]
        latents = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
        golden.assert_close(record, "patchified", _patches(latents))
        golden.assert_close(record, "packed", packing.packed(latents))
        assert torch.equal(packing.unpacked(packing.packed(latents), *shape[2:]), latents)

    @pytest.mark.parametrize("name", ["pack_flux2_1x2x4x6", "pack_flux2_2x1x2x4"])
    def test_positions(self, backbone, name):
        record, seen = RECORDS[name], {}
        shape = record["hyperparameters"]["shape"]
        backbone.denoiser.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
        cond = Conditioning({"prompt_embeds": torch.zeros(shape[0], 3, 24)})
        with torch.no_grad():
            backbone.predict(backbone.denoiser, torch.zeros(shape[0], 32, *shape[2:]), torch.zeros(shape[0]), cond)
        golden.assert_close(record, "image_ids", seen["img_ids"].expand(shape[0], -1, -1))
        golden.assert_close(record, "text_ids", seen["txt_ids"].expand(shape[0], -1, -1))

    def test_one_pass_and_its_error(self, backbone, network):
        record, path = RECORDS["backbone_flux2"], backbone.path
        x0, noise = golden.fill((2, 32, 8, 8), 1000), golden.fill((2, 32, 8, 8), 1001, 1.5)
        problem = with_noise(path, x0, noise, 1000 * torch.tensor(record["inputs"]["s"]))
        torch.testing.assert_close(problem.xt.flatten()[:4], torch.tensor(record["expected"]["x_s_first4"]))
        velocity = backbone.predict(network, problem.xt, problem.timesteps, _cond(1010))
        golden.assert_close(record, "velocity", velocity)
        error = errors(DenoisingOutputs(policy=velocity), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()))
        golden.assert_close(record, "grad_norm_of_mean_error", torch.cat([g.flatten() for g in gradients]).norm())

    @pytest.mark.parametrize("kind", ["plain", "cfg"])
    @torch.no_grad()
    def test_three_steps_of_its_pipeline(self, backbone, network, kind):
        record = RECORDS["pipeline_flux2"]
        scale = record["hyperparameters"]["guidance"][kind]["guidance_scale"]
        x, cond, empty = golden.fill((2, 32, 8, 8), 1001, 1.5), _cond(1010), _cond(1020)
        for here, there in pairwise(torch.tensor(record["expected"]["sigmas"])):
            timesteps = (1000 * here).repeat(2)
            v, without = (backbone.predict(network, x, timesteps, told) for told in (cond, empty))
            x = x + (there - here) * (without + scale * (v - without))
        golden.assert_close(record, f"latents_{kind}", x)


@torch.no_grad()
@pytest.mark.parametrize("model", ["tiny_klein", "tiny_flux2_dev"])
def test_prompts_equal_the_pipeline(request, model):
    folder = request.getfixturevalue(model)
    backbone = backbones.load(folder)
    expected, _ = DiffusionPipeline.from_pretrained(folder).encode_prompt(PROMPTS, device="cpu")
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    assert torch.equal(text["prompt_embeds"], expected)
    assert expected.shape == (3, 512, 24)
    assert expected[0].numel() == backbone.prompt_size(backbone.denoiser.config)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_whole_trajectory_equals_the_stock_pipeline(tiny_klein, backbone, guidance):
    stock, noise = DiffusionPipeline.from_pretrained(tiny_klein), _noise(12, 16)
    stock.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": guidance, "height": 48, "width": 64}
    prompts = [PROMPT, "a cat"]
    expected = stock(prompt=prompts, latents=_patches(noise), output_type="pt", **settings).images
    cond, empty, x = _told(backbone, prompts), _told(backbone, [""]), noise

    def velocity(xt, timesteps, cond):
        return backbone.predict(backbone.denoiser, xt, timesteps, cond)

    for here, there in pairwise(stock.scheduler.sigmas):
        x = x + (there - here) * guided(velocity, x, (1000 * here).repeat(2), cond, empty, guidance)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_trajectory_of_dev_is_told_its_guidance(tiny_flux2_dev, guidance):
    stock, backbone, x = DiffusionPipeline.from_pretrained(tiny_flux2_dev), backbones.load(tiny_flux2_dev), _noise()
    assert backbone.guidance == 1.0
    backbone.guidance = guidance
    stock.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 64, "width": 64}
    prompts = [PROMPT, "a cat"]
    expected = stock(prompt=prompts, latents=_patches(x), output_type="pt", **settings).images
    cond = _told(backbone, prompts)
    for here, there in pairwise(stock.scheduler.sigmas):
        x = x + (there - here) * backbone.predict(backbone.denoiser, x, (1000 * here).repeat(2), cond)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


def test_training_meets_the_levels_that_sampling_in_50_steps_shifts_to(tiny_klein, backbone):
    """The shift follows the tokens of the picture: 8 x 8 of them at 64 pixels of a VAE that halves twice."""
    stock = DiffusionPipeline.from_pretrained(tiny_klein)
    stock.set_progress_bar_config(disable=True)
    stock(prompt="a", num_inference_steps=50, guidance_scale=1.0, height=64, width=64, output_type="latent")
    shift = backbone.shift_at(64)
    torch.testing.assert_close(shift(torch.linspace(1, 1 / 50, 50)), stock.scheduler.sigmas[:-1])
    at_200, at_10 = 0.00016927 * 64 + 0.45666666, 8.73809524e-05 * 64 + 1.89833333
    assert shift.mu == pytest.approx(at_200 - 150 * (at_200 - at_10) / 190)


class TestLatents:
    @torch.no_grad()
    def test_they_are_normalised_as_the_pipeline_does(self, tiny_klein, backbone):
        stock = DiffusionPipeline.from_pretrained(tiny_klein)
        images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
        mean, std = backbone.encode_images(images)
        assert mean.shape == std.shape == (2, 32, 16, 12)
        torch.testing.assert_close(_patches(mean), stock._encode_vae_image(images * 2 - 1, generator=None))
        spread = (stock.vae.bn.running_var + 1e-4).sqrt()
        raw = stock.vae.encode(images * 2 - 1).latent_dist
        torch.testing.assert_close(_patches(std), _patches(raw.std) / spread[:, None, None])
        decoded = stock.vae.decode(raw.mean, return_dict=False)[0]
        torch.testing.assert_close(backbone.decode_latents(mean), (decoded / 2 + 0.5).clamp(0, 1))

    def test_of_the_record(self, backbone):
        record = RECORDS["latent_norm_flux2"]
        given = {name: torch.tensor(value) for name, value in record["inputs"].items()}
        backbone.vae.bn.running_mean, backbone.vae.bn.running_var = given["running_mean"], given["running_var"]
        assert backbone.vae.config.batch_norm_eps == record["hyperparameters"]["batch_norm_eps"]
        centre, spread = backbone._statistics()
        tokens = (packing.packed(given["z"]) - centre) / spread
        golden.assert_close(record, "latents", _patches(packing.unpacked(tokens, *given["z"].shape[2:])))

    def test_another_vae_is_read_as_one_of_the_family(self, tiny_klein, tiny_flux2_dev, backbone):
        other = backbones.load(tiny_klein, vae=tiny_flux2_dev)
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        wanted = backbones.load(tiny_flux2_dev).encode_images(images)[0]
        assert torch.equal(other.encode_images(images)[0], wanted)
        assert not torch.equal(backbone.encode_images(images)[0], wanted)

    def test_other_statistics_are_other_latents_to_the_cache(self, tiny_klein, backbone):
        before = backbone.fingerprint()
        other = backbones.load(tiny_klein)
        other.vae.bn.running_var[0] += 0.1
        assert other.fingerprint() != before
        assert backbones.load(tiny_klein).fingerprint() == before

    def test_the_fingerprint_knows_the_chat_template_of_dev(self, tiny_flux2_dev):
        one, other = backbones.load(tiny_flux2_dev), backbones.load(tiny_flux2_dev)
        other.tokenizers[0].chat_template += "!"
        assert one.fingerprint() == backbones.load(tiny_flux2_dev).fingerprint() != other.fingerprint()

    def test_in_half_precision(self, tiny_klein):
        backbone = backbones.load(tiny_klein, torch_dtype=torch.bfloat16)
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        mean, _ = backbone.encode_images(images)
        assert mean.dtype == torch.float32
        exact = backbones.load(tiny_klein).encode_images(images)[0]
        assert (mean - exact).norm() < 0.02 * exact.norm()


class TestAdapters:
    def _added(self, backbone, rank, **settings):
        denoiser = backbone.denoiser
        idle = backbone.idle_layers(denoiser)
        return adapters.add_lora(denoiser, rank, target_modules=backbone.lora_targets, idle=idle, **settings)

    def _loss(self, backbone):
        x0 = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(5))
        noise, times = torch.randn(x0.shape, generator=torch.Generator().manual_seed(6)), torch.tensor([300.0, 800.5])
        cond = _told(backbone, ["a cat", PROMPT])
        xt, wanted = add_noise(backbone.path, x0, noise, times), target(backbone.path, x0, noise, times)
        assert torch.equal(wanted, noise - x0)
        return (backbone.predict(backbone.denoiser, xt, times, cond) - wanted).square().mean()

    def test_every_layer_of_the_blocks_has_one_and_every_one_learns(self, backbone):
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        linear = {name for name, part in backbone.denoiser.named_modules() if isinstance(part, torch.nn.Linear)}
        self._added(backbone, 2)
        adapted = set(adapters.adapted_layers(backbone.denoiser, adapters.ADAPTER))
        assert adapted == {name for name in linear if name.startswith(blocks)}
        assert len(adapted) == LAYERS
        learning = {name: p for name, p in backbone.denoiser.named_parameters() if "lora_B" in name}
        gradients = torch.autograd.grad(self._loss(backbone), list(learning.values()))
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_recomputed_activations_give_the_same_gradients(self, backbone):
        perturb(self._added(backbone, 2))
        learning = adapters.trainable_parameters(backbone.denoiser)
        plain = torch.autograd.grad(self._loss(backbone), learning)
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.denoiser.train()
        for ours, other in zip(plain, torch.autograd.grad(self._loss(backbone), learning), strict=True):
            torch.testing.assert_close(ours, other)

    def test_a_lora_draws_the_same_in_the_stock_pipeline(self, tiny_klein, backbone, tmp_path, recwarn):
        perturb(self._added(backbone, 4, alpha=8), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        names = load_file(file).keys()
        starts = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")
        assert len(names) == 2 * LAYERS
        assert all(name.startswith(starts) for name in names)
        stock = DiffusionPipeline.from_pretrained(tiny_klein)
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(tiny_klein).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]

    def test_to_out_alone_means_the_layers_of_the_single_blocks(self, backbone):
        adapters.add_lora(backbone.denoiser, 2, target_modules=["to_out"])
        assert adapters.adapted_layers(backbone.denoiser, adapters.ADAPTER) == [
            f"single_transformer_blocks.{block}.attn.to_out" for block in (0, 1)
        ]

    def test_a_whole_transformer_takes_the_place_of_the_base(self, tiny_klein, backbone, tmp_path):
        perturb(backbone.denoiser.parameters(), scale=0.02)
        export.save_denoiser(backbone.denoiser, tmp_path)
        loaded = export.load_adapter_into(loading.load(tiny_klein).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=1e-6)
        continued = backbones.load(tiny_klein, unet_init=tmp_path)
        assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()

    def test_a_lora_of_another_transformer_is_refused(self, tiny_flux, backbone, tmp_path):
        other = backbones.load(tiny_flux)
        adapters.add_lora(other.denoiser, 2, target_modules=other.lora_targets, idle=other.idle_layers(other.denoiser))
        export.save_lora(other.denoiser, tmp_path)
        with pytest.raises(ModelError):
            export.load_adapter_into(backbone.pipeline(), tmp_path)


class TestNegativePrompts:
    """Klein's pipeline takes embeddings of one, and predicts the two branches one after the other."""

    def test_it_takes_the_place_of_the_empty_prompt(self, tiny_klein, backbone):
        stock = DiffusionPipeline.from_pretrained(tiny_klein)
        embeds = stock.encode_prompt(["blur"])[0]
        generator = torch.Generator().manual_seed(3)
        wanted = stock(prompt=[PROMPT], negative_prompt_embeds=embeds, generator=generator, **GUIDED).images[0]
        settings = SamplingSettings(**GUIDED, negative_prompt="blur")
        assert generate(backbone.pipeline(), [PROMPT], [3], settings, progress=False)[0].tobytes() == wanted.tobytes()
        plain = generate(backbone.pipeline(), [PROMPT], [3], SamplingSettings(**GUIDED), progress=False)[0]
        assert plain.tobytes() != wanted.tobytes()

    def test_after_distillation_there_is_no_branch_for_it(self, tmp_path):
        backbone = backbones.load(build_tiny_klein(tmp_path / "klein", is_distilled=True))
        pipeline = backbone.pipeline()
        assert pipeline.config.is_distilled
        settings = SamplingSettings(**GUIDED, negative_prompt="blur")
        with pytest.raises(UserError, match="negative prompt has no effect on its pictures"):
            generate(pipeline, [PROMPT], [0], settings, progress=False)
        with pytest.raises(ModelError, match="there is no branch for a negative network"):
            with_negative_branch(pipeline, tmp_path)

    def test_dev_has_none_either(self, tiny_flux2_dev):
        settings = SamplingSettings(**GUIDED, negative_prompt="blur")
        with pytest.raises(UserError, match="A Flux2Pipeline is told its guidance_scale"):
            generate(backbones.load(tiny_flux2_dev).pipeline(), [PROMPT], [0], settings, progress=False)


class TestWhatCannotBeTrained:
    @pytest.fixture
    def empty(self, tiny_klein, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(tiny_klein, tmp_path / "klein")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    def test_klein_after_its_distillation(self, empty):
        index = json.loads((empty / "model_index.json").read_text())
        (empty / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
        for refuse in (inspection.check, loading.load):
            with pytest.raises(ModelError, match=r"is_distilled in its model_index.json\) is distilled to draw"):
                refuse(str(empty), resolution=64)

    def test_few_step_models_by_their_names(self):
        for name in ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9b-kv", "x/FLUX.2-dev-Turbo"):
            with pytest.raises(ModelError, match="distilled to draw in a few steps"):
                inspection.check(name, 1024)
        for name in ("klein-base-4B", "klein-base-9B", "dev"):
            inspection.check(f"black-forest-labs/FLUX.2-{name}", 1024)

    def test_a_resolution_that_packing_does_not_divide(self, empty):
        with pytest.raises(ModelError, match="multiples of 8 for this model, got 60x60"):
            loading.load(empty, resolution=60)

    def test_a_missing_encoder(self, empty):
        index = json.loads((empty / "model_index.json").read_text())
        (empty / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
        with pytest.raises(ModelError, match="names no text_encoder"):
            loading.load(empty, resolution=64)

    def test_a_transformer_of_other_latents(self, tiny_klein):
        parts = backbones.load(tiny_klein).pipeline()
        parts.transformer = Flux2Transformer2DModel.from_config({**parts.transformer.config, "in_channels": 64})
        with pytest.raises(ModelError, match="takes 16 channels, the VAE makes 32"):
            backbones.load(tiny_klein).over(parts, "other")
