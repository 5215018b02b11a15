"""Qwen-Image against golden records and diffusers' own pipeline: prompts, a pass, trajectories, pictures, adapters."""

import json
import math
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading, packing
from diffalign.backbones.conditioning import MASK
from diffalign.denoising import errors
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb

RECORDS = golden.load("flow_qwen")
SIZES = {"height": 64, "width": 64, "num_inference_steps": 2}
PROMPTS = [PROMPT, "", "a cat, on the photo! " * 30]
TWO = [PROMPT, "a cat"]


@pytest.fixture
def backbone(tiny_qwen):
    return backbones.load(tiny_qwen)


@pytest.fixture
def stock(tiny_qwen):
    pipeline = QwenImagePipeline.from_pretrained(tiny_qwen)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def network():
    """Return the transformer of the records, its weights a formula."""
    return golden.network(QwenImageTransformer2DModel, RECORDS["backbone_qwen"])


def _cond(stream, mask):
    return Conditioning({"prompt_embeds": golden.fill((2, 7, 16), stream), MASK: torch.tensor(mask).bool()})


def _noise(number=2, seed=3):
    return torch.randn(number, 16, 16, 12, generator=torch.Generator().manual_seed(seed))


def _told(backbone, prompts):
    with torch.no_grad():
        return backbone.condition(backbone.encode_prompts(prompts), None)


def _guided(v, without, scale):
    """Return what the pipeline makes of both velocities: guided, then each token as long as it was with the prompt."""
    v, combined = packing.packed(v), packing.packed(without + scale * (v - without))
    return combined * (v.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


class TestGoldens:
    def test_one_pass_and_its_error(self, backbone, network):
        record = RECORDS["backbone_qwen"]
        x0, noise = golden.fill((2, 16, 8, 8), 1000), golden.fill((2, 16, 8, 8), 1001, 1.5)
        problem = with_noise(backbone.path, x0, noise, 1000 * torch.tensor(record["inputs"]["s"]))
        velocity = backbone.predict(network, problem.xt, problem.timesteps, _cond(1010, record["inputs"]["mask"]))
        golden.assert_close(record, "velocity", velocity)
        error = errors(DenoisingOutputs(policy=velocity), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()), allow_unused=True)
        reached = [gradient.flatten() for gradient in gradients if gradient is not None]
        golden.assert_close(record, "grad_norm_of_mean_error", torch.cat(reached).norm())
        names = [name for name, _ in network.named_parameters()]
        unread = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
        assert sorted(unread) == record["expected"]["parameters_without_gradient"]
        assert {name.rpartition(".")[0] for name in unread} == set(backbone.unread_layers(network))

    @pytest.mark.parametrize("kind", ["plain", "cfg"])
    @torch.no_grad()
    def test_three_steps_of_its_pipeline(self, backbone, network, kind):
        record = RECORDS["pipeline_qwen"]
        scale = record["hyperparameters"]["guidance"][kind]["true_cfg_scale"]
        cond, empty = _cond(1010, record["inputs"]["mask"]), _cond(1020, [[1] * 7] * 2)
        x = golden.fill((2, 16, 8, 8), 1001, 1.5)
        for here, there in pairwise(torch.tensor(record["expected"]["sigmas"])):
            timesteps = (1000 * here).repeat(2)
            v, without = (backbone.predict(network, x, timesteps, told) for told in (cond, empty))
            x = x + (there - here) * packing.unpacked(_guided(v, without, scale), 8, 8)
        golden.assert_close(record, f"latents_{kind}", x)


@torch.no_grad()
def test_prompts_equal_the_pipeline(stock, backbone):
    expected, mask = stock.encode_prompt(list(PROMPTS), device="cpu", max_sequence_length=512)
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    kept = text[MASK].sum(1).tolist()
    assert kept == mask.sum(1).tolist()
    assert kept[1] < kept[0] < kept[2] == 512
    torch.testing.assert_close(text["prompt_embeds"], expected * mask[..., None], rtol=1e-5, atol=1e-6)
    assert torch.equal(text[MASK], mask.bool())
    alone = backbone.encode_prompts(PROMPTS[1:2])  # padded all the same, so that prompts can be cached one by one
    assert alone["prompt_embeds"].shape == (1, 512, 16)
    torch.testing.assert_close(alone["prompt_embeds"], text["prompt_embeds"][1:2], rtol=1e-5, atol=1e-6)
    assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)


@pytest.mark.parametrize("prompts", [TWO, [PROMPT, PROMPT]])
@torch.no_grad()
def test_one_call_equals_the_stock_pipelines(stock, backbone, prompts):
    """With a mask if prompts are of unequal lengths, and without one if there is no padding."""
    seen = []
    stock.transformer.register_forward_hook(lambda *call: seen.append(call[2:]), with_kwargs=True)
    sizes = {"height": 64, "width": 48, "num_inference_steps": 2}
    stock(prompts, latents=packing.packed(_noise()), output_type="latent", **sizes)
    (told, output), cond = seen[0], _told(backbone, prompts)
    prediction = backbone.predict(backbone.denoiser, _noise(), 1000 * told["timestep"], cond)
    assert (told["encoder_hidden_states_mask"] is None) == (len(set(prompts)) == 1)
    assert torch.equal(packing.packed(prediction), output[0])


@torch.no_grad()
def test_a_whole_trajectory_equals_the_stock_pipeline(stock, backbone):
    sizes = {"height": 64, "width": 48, "num_inference_steps": 5}
    told = {"negative_prompt": [" "] * 2, "true_cfg_scale": 4.0}
    expected = stock(TWO, latents=packing.packed(_noise()), output_type="pt", **told, **sizes).images
    cond, empty, x = _told(backbone, TWO), _told(backbone, [" "] * 2), _noise()
    for here, there in pairwise(stock.scheduler.sigmas):
        times = (1000 * here).repeat(2)
        v, without = (backbone.predict(backbone.denoiser, x, times, told) for told in (cond, empty))
        x = x + (there - here) * packing.unpacked(_guided(v, without, 4.0), 16, 12)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


def test_training_meets_the_levels_that_sampling_shifts_to(backbone, stock):
    """8 x 8 tokens at 64 pixels; a ladder of many steps ends where training's own levels do."""
    mu = 0.5 + (64 - 256) * (0.9 - 0.5) / (8192 - 256)
    shift, levels = backbone.shift_at(64), torch.linspace(1, 1e-4, 10_000)
    stock.scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu)
    assert shift.mu == pytest.approx(mu)
    assert shift.terminal == 0.02
    torch.testing.assert_close(shift(levels), stock.scheduler.sigmas[:-1], rtol=1e-3, atol=2e-4)


class TestPictures:
    @torch.no_grad()
    def test_latents_are_normalised_by_channel(self, backbone):
        images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
        mean, std = backbone.encode_images(images)
        posterior = backbone.vae.encode((images * 2 - 1)[:, :, None]).latent_dist
        means, deviations = (
            torch.tensor(numbers)[:, None, None]
            for numbers in (backbone.vae.config.latents_mean, backbone.vae.config.latents_std)
        )
        torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - means) / deviations)
        torch.testing.assert_close(std, posterior.std[:, :, 0] / deviations)
        assert mean.shape == (2, 16, 16, 12)
        decoded = backbone.vae.decode(posterior.mean).sample[:, :, 0]
        torch.testing.assert_close(backbone.decode_latents(mean), (decoded / 2 + 0.5).clamp(0, 1))

    def test_decoding_is_differentiable(self, backbone):
        x0 = _noise(1).requires_grad_()
        backbone.decode_latents(x0).sum().backward()
        assert x0.grad.abs().sum() > 0

    def test_the_fingerprint_knows_each_number_of_the_scaling(self, tiny_qwen, backbone):
        other = backbones.load(tiny_qwen)
        assert other.fingerprint() == backbone.fingerprint()
        other, numbers = backbones.load(tiny_qwen), list(backbone.vae.config.latents_std)
        numbers[3] += 1e-6
        other.vae.register_to_config(latents_std=numbers)
        assert other.fingerprint() != backbone.fingerprint()

    def test_in_half_precision(self, tiny_qwen):
        backbone = backbones.load(tiny_qwen, torch_dtype=torch.float16)
        mean, _ = backbone.encode_images(torch.rand(1, 3, 64, 64))
        assert mean.dtype == torch.float32
        assert backbone.decode_latents(mean).isfinite().all()

    def test_another_vae_of_its_kind_can_be_used(self, tiny_qwen, backbone, tmp_path):
        perturb(backbone.vae.parameters())
        backbone.vae.save_pretrained(tmp_path / "vae")
        assert backbones.load(tiny_qwen, vae=tmp_path / "vae").fingerprint() != backbones.load(tiny_qwen).fingerprint()


@torch.no_grad()
def test_masked_text_and_other_examples_have_no_influence(backbone):
    prompts, times = [PROMPT, "a cat", "a"], torch.tensor([20.0, 500.5, 990.0])
    cond = _told(backbone, prompts)
    spoilt = cond["prompt_embeds"].masked_fill(~cond[MASK][..., None], 7.0)
    told = [cond, Conditioning({"prompt_embeds": spoilt, MASK: cond[MASK]})]
    plain, other = (backbone.predict(backbone.denoiser, _noise(3), times, entry) for entry in told)
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)
    alone = backbone.predict(backbone.denoiser, _noise(3)[1:2], times[1:2], cond.select([1]))
    torch.testing.assert_close(alone, plain[1:2], rtol=1e-4, atol=1e-5)
    swapped = backbone.predict(backbone.denoiser, _noise(3), times, cond.select([1, 2, 0]))
    assert (swapped - plain).abs().amax((1, 2, 3)).min() > 1e-4


def test_it_predicts_in_its_own_dtype(tiny_qwen):
    backbone = backbones.load(tiny_qwen, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        prediction = backbone.predict(backbone.denoiser, _noise(), torch.tensor([10.0, 900.0]), _told(backbone, TWO))
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()


class TestGuidance:
    def _drawn(self, backbone, **settings):
        settings = SamplingSettings(**SIZES, **settings)
        return generate(backbone.pipeline(), TWO, [0, 1], settings, progress=False)

    @pytest.mark.parametrize(("negative", "given"), [("", " "), ("a green square", "a green square")])
    def test_its_scale_and_negative_prompt_drive_the_pipeline(self, stock, backbone, negative, given):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        told = {"true_cfg_scale": 7.0, "negative_prompt": [given] * 2}
        expected = stock(TWO, generator=generators, **told, **SIZES).images
        drawn = self._drawn(backbone, guidance_scale=7.0, negative_prompt=negative)
        assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
        assert drawn[0].tobytes() != self._drawn(backbone, guidance_scale=1.0)[0].tobytes()

    def test_without_it_there_is_one_pass_a_step(self, backbone):
        calls = []
        backbone.denoiser.register_forward_hook(lambda *_: calls.append(1))
        for scale, passes in ((1.0, 2), (4.0, 4)):
            calls.clear()
            self._drawn(backbone, guidance_scale=scale)
            assert len(calls) == passes

    def test_the_negative_branch_needs_it(self, backbone, tmp_path):
        _with_lora(backbone)
        export.save_lora(backbone.denoiser, tmp_path)
        pipeline = with_negative_branch(backbone.pipeline(), tmp_path)
        with pytest.raises(ModelError, match="The negative branch needs guidance"):
            generate(pipeline, TWO, [0, 1], SamplingSettings(guidance_scale=1.0, **SIZES), progress=False)
        assert generate(pipeline, TWO, [0, 1], SamplingSettings(guidance_scale=3.0, **SIZES), progress=False)


def _with_lora(backbone, rank=4, alpha=8):
    denoiser = backbone.denoiser
    idle = backbone.idle_layers(denoiser)
    return adapters.add_lora(denoiser, rank, alpha=alpha, target_modules=backbone.lora_targets, idle=idle)


class TestLora:
    def test_every_adapter_gets_a_gradient(self, backbone):
        _with_lora(backbone)
        prediction = backbone.predict(
            backbone.denoiser, _noise(), torch.tensor([300.0, 800.5]), _told(backbone, ["a cat", PROMPT])
        )
        named = {name: p for name, p in backbone.denoiser.named_parameters() if "lora_B" in name}
        gradients = torch.autograd.grad((prediction - 1).square().mean(), list(named.values()))
        assert len(named) == 2 * 12 - 4  # of the last block's text, keys and values alone
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_where_it_is_left_out_it_would_get_none(self, backbone):
        denoiser = backbone.denoiser
        adapters.add_lora(denoiser, 4, target_modules=backbone.idle_layers(denoiser))
        prediction = backbone.predict(denoiser, _noise(), torch.tensor([300.0, 800.5]), _told(backbone, TWO))
        idle = [p for name, p in denoiser.named_parameters() if "lora_B" in name]
        gradients = torch.autograd.grad(prediction.square().mean(), idle, allow_unused=True)
        assert [gradient is None or not gradient.any() for gradient in gradients] == [True] * 4

    def test_it_draws_the_same_in_the_stock_pipeline(self, tiny_qwen, stock, backbone, tmp_path, recwarn):
        perturb(_with_lora(backbone), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        assert all(name.startswith("transformer.transformer_blocks.") for name in load_file(file))
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(tiny_qwen).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]

    def test_that_of_another_family_is_refused(self, tiny_zimage, backbone, tmp_path):
        other = backbones.load(tiny_zimage)
        _with_lora(other)
        export.save_lora(other.denoiser, tmp_path)
        with pytest.raises(ModelError):
            export.load_adapter_into(backbone.pipeline(), tmp_path)


def test_a_whole_transformer_takes_the_place_of_the_base(tiny_qwen, backbone, tmp_path):
    perturb(backbone.denoiser.parameters(), scale=0.02)
    export.save_denoiser(backbone.denoiser, tmp_path)
    loaded = export.load_adapter_into(loading.load(tiny_qwen).pipeline(), tmp_path)
    torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=1e-6)
    continued = backbones.load(tiny_qwen, unet_init=tmp_path)
    assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()


class TestWhatCannotBeTrained:
    @pytest.fixture
    def folder(self, tiny_qwen, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(tiny_qwen, tmp_path / "Qwen-Image")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    def _change(self, file, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def _refused(self, folder, message):
        for refuse in (inspection.check, loading.load):
            with pytest.raises(ModelError, match=message):
                refuse(str(folder), resolution=64)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("lightx2v/Qwen-Image-Lightning", "distilled to draw in a few steps"),
            ("DiffSynth-Studio/Qwen-Image-Distill-Full", "distilled to draw in a few steps"),
            ("Qwen/Qwen-Image-Edit-2511", "is given a picture besides the prompt"),
            ("Qwen/Qwen-Image-Layered", "is given a picture besides the prompt"),
        ],
    )
    def test_by_their_names(self, folder, name, message):
        with pytest.raises(ModelError, match=message):
            inspection.check(name, 1024)
        self._refused(folder.rename(folder.parent / name.partition("/")[2]), message)

    @pytest.mark.parametrize("name", ["Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"])
    def test_the_models_that_can_be(self, name):
        inspection.check(name, 1024)
        assert inspection.transformer_family(name).family == "qwen"

    def test_lightning_under_another_name(self, folder):
        same = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
        self._change(folder / "scheduler" / "scheduler_config.json", **same)
        self._refused(folder, r"as Qwen-Image-Lightning's does, which is distilled to draw in a few steps")

    @pytest.mark.parametrize("setting", ["zero_cond_t", "use_layer3d_rope", "guidance_embeds"])
    def test_transformers_of_other_tasks(self, folder, setting):
        self._change(folder / "transformer" / "config.json", **{setting: True})
        self._refused(folder, rf"\({setting}\) is .*Train the text-to-image model")

    @pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageInpaintPipeline"])
    def test_pipelines_of_other_tasks(self, folder, name):
        self._change(folder / "model_index.json", _class_name=name)
        self._refused(folder, f"is a {name}, which is given a picture.*text-to-image")

    def test_a_resolution_that_packing_does_not_divide(self, folder):
        self._refused_at(folder, 60, "multiples of 8 for this model, got 60x60")

    def _refused_at(self, folder, resolution, message):
        with pytest.raises(ModelError, match=message):
            loading.load(folder, resolution=resolution)

    def test_without_its_text_encoder(self, folder):
        self._change(folder / "model_index.json", text_encoder=[None, None])
        self._refused_at(folder, 64, "names no text_encoder")

    def test_a_transformer_of_other_latents(self, backbone):
        parts = backbone.pipeline()
        parts.transformer = QwenImageTransformer2DModel.from_config({**parts.transformer.config, "in_channels": 128})
        with pytest.raises(ModelError, match="takes 32 channels, the VAE makes 16"):
            backbone.over(parts, "control")
