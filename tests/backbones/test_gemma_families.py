"""SANA and Lumina-Image 2.0 against golden records and diffusers' own pipelines: prompts, trajectories, adapters."""

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
)
from safetensors.torch import load_file
from torch import nn

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading
from diffalign.backbones.adapters import active_adapters
from diffalign.backbones.conditioning import MASK
from diffalign.backbones.sana import INSTRUCTION
from diffalign.denoising import errors
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb

PROMPTS = ["A Red circle on a blue background ", "", "a cat, on the photo! " * 30]
TWO = [PROMPT, "a cat"]


@dataclass(frozen=True)
class Case:
    """Say what differs between the families."""

    network: type[nn.Module]
    latents: tuple[int, int, int]  # of the golden records
    width: int  # of their text
    told: dict[str, Any]  # arguments of the pipeline that encodes a prompt as it does when it draws
    drawn: dict[str, Any]  # arguments of the pipeline that draws
    layers: int  # adapted ones
    scaling: tuple[float, float]  # shift and scale of latents
    normalised: bool = False  # the pipeline scales what guidance makes to the length it had, row by row


CASES = {
    "sana": Case(
        network=SanaTransformer2DModel,
        latents=(32, 4, 4),
        width=16,
        told={"complex_human_instruction": INSTRUCTION.split("\n")},
        drawn={"use_resolution_binning": False},
        layers=2 * 2 * 4,
        scaling=(0.0, 0.41407),
    ),
    "lumina2": Case(
        network=Lumina2Transformer2DModel,
        latents=(16, 8, 8),
        width=8,
        told={},
        drawn={},
        layers=4 * 7,
        scaling=(0.1159, 0.3611),
        normalised=True,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def case(family):
    return CASES[family]


@pytest.fixture(scope="module")
def records(family):
    return golden.load(f"flow_{family}")


@pytest.fixture(scope="module")
def network(case, family, records):
    """Return the transformer of the records, its weights a formula."""
    return golden.network(case.network, records[f"backbone_{family}"])


@pytest.fixture
def folder(request, family):
    return request.getfixturevalue(f"tiny_{family}")


@pytest.fixture
def backbone(folder):
    return backbones.load(folder)


@pytest.fixture
def stock(folder):
    """Return diffusers' pipeline, with Euler's steps."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _cond(case, stream, mask):
    return Conditioning({"prompt_embeds": golden.fill((2, 7, case.width), stream), MASK: torch.tensor(mask).bool()})


def _noise(backbone, number=2, seed=3):
    side = 64 // backbone.vae_scale_factor
    return torch.randn(number, backbone.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))


def _guided(v, without, scale, normalised):
    combined = without + scale * (v - without)
    return combined * (v.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)) if normalised else combined


def _told(backbone, prompts):
    with torch.no_grad():
        return backbone.condition(backbone.encode_prompts(prompts), None)


def _without_prompt(stock, number):
    """Return what the pipeline guides away from."""
    _, _, states, mask = stock.encode_prompt([PROMPT] * number, negative_prompt=[""] * number, device="cpu")
    return Conditioning({"prompt_embeds": states, MASK: mask.bool()})


class TestGoldens:
    def test_one_pass_and_its_error(self, case, family, records, backbone, network):
        record = records[f"backbone_{family}"]
        x0, noise = golden.fill((2, *case.latents), 1000), golden.fill((2, *case.latents), 1001, 1.5)
        problem = with_noise(backbone.path, x0, noise, 1000 * torch.tensor(record["inputs"]["s"]))
        cond = _cond(case, 1010, record["inputs"]["mask"])
        velocity = backbone.predict(network, problem.xt, problem.timesteps, cond)
        golden.assert_close(record, "velocity", velocity)
        error = errors(DenoisingOutputs(policy=velocity), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()))
        golden.assert_close(record, "grad_norm_of_mean_error", torch.cat([g.flatten() for g in gradients]).norm())

    @torch.no_grad()
    def test_three_steps_of_euler(self, case, family, records, backbone, network):
        record = records[f"pipeline_{family}"]
        cond, empty = _cond(case, 1010, record["inputs"]["mask"]), _cond(case, 1020, [[1] * 7] * 2)
        for kind, told in record["hyperparameters"]["guidance"].items():
            normalised = case.normalised and told["guidance_scale"] > 1 and told.get("cfg_normalization", True)
            x = golden.fill((2, *case.latents), 1001, 1.5)
            for here, there in pairwise(torch.tensor(record["expected"]["sigmas"])):
                v, without = (backbone.predict(network, x, (1000 * here).repeat(2), given) for given in (cond, empty))
                x = x + (there - here) * _guided(v, without, told["guidance_scale"], normalised)
            golden.assert_close(record, f"latents_{kind}", x)


@torch.no_grad()
def test_prompts_equal_the_pipeline(case, stock, backbone):
    expected, mask, *_ = stock.encode_prompt(
        list(PROMPTS), device="cpu", do_classifier_free_guidance=False, **case.told
    )
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    assert torch.equal(text[MASK], mask.bool())
    kept = mask.sum(1).tolist()
    assert kept[1] < kept[0] < kept[2] <= backbone.padded_length
    assert torch.equal(text["prompt_embeds"], expected * mask[..., None])
    alone = backbone.encode_prompts(PROMPTS[1:2])
    torch.testing.assert_close(alone["prompt_embeds"], text["prompt_embeds"][1:2], rtol=1e-5, atol=1e-6)
    assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)


@torch.no_grad()
def test_one_call_equals_the_stock_pipelines(case, family, stock, backbone):
    seen = []
    stock.transformer.register_forward_hook(lambda *call: seen.append(call[2:]), with_kwargs=True)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    stock(TWO, latents=_noise(backbone), guidance_scale=1.0, **sizes, **case.drawn)
    times = stock.scheduler.timesteps[:1].repeat(2)
    prediction = backbone.predict(backbone.denoiser, _noise(backbone), times, _told(backbone, TWO))
    assert torch.equal(prediction, (-1 if family == "lumina2" else 1) * seen[0][1][0])


@torch.no_grad()
def test_a_whole_trajectory_equals_the_stock_pipeline(case, stock, backbone):
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
    expected = stock(TWO, latents=_noise(backbone), **settings, **case.drawn).images
    cond, empty, x = _told(backbone, TWO), _without_prompt(stock, 2), _noise(backbone)
    for here, there in pairwise(stock.scheduler.sigmas):
        times = (1000 * here).repeat(2)
        v, without = (backbone.predict(backbone.denoiser, x, times, told) for told in (cond, empty))
        x = x + (there - here) * _guided(v, without, 4.0, case.normalised)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)


def test_its_own_scheduler_draws_the_same(folder, backbone):
    stock = DiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


@torch.no_grad()
def test_masked_text_and_other_examples_have_no_influence(backbone):
    prompts, times = [PROMPT, "a cat", "a"], torch.tensor([20.0, 500.5, 990.0])
    cond, noise = _told(backbone, prompts), _noise(backbone, 3)
    spoilt = cond["prompt_embeds"].masked_fill(~cond[MASK][..., None], 7.0)
    told = [cond, Conditioning({"prompt_embeds": spoilt, MASK: cond[MASK]})]
    plain, other = (backbone.predict(backbone.denoiser, noise, times, entry) for entry in told)
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)
    alone = backbone.predict(backbone.denoiser, noise[1:2], times[1:2], cond.select([1]))
    torch.testing.assert_close(alone, plain[1:2], rtol=1e-4, atol=1e-5)
    swapped = backbone.predict(backbone.denoiser, noise, times, cond.select([1, 2, 0]))
    assert (swapped - plain).abs().amax((1, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_pictures_are_shifted_and_scaled_as_the_pipeline_decodes_them(case, backbone):
    images, (shift, scale) = torch.rand(2, 3, 64, 64), case.scaling
    mean, std = backbone.encode_images(images)
    encoded = backbone.vae.encode(images * 2 - 1)
    latents = encoded.latent if backbone.family == "sana" else encoded.latent_dist.mean
    torch.testing.assert_close(mean, (latents - shift) * scale)
    assert mean.shape == std.shape == _noise(backbone).shape
    assert bool(std.any()) == (backbone.family != "sana")
    decoded = backbone.vae.decode(latents).sample
    torch.testing.assert_close(backbone.decode_latents(mean), (decoded / 2 + 0.5).clamp(0, 1))


def test_decoding_is_differentiable(backbone):
    x0 = _noise(backbone, 1).requires_grad_()
    backbone.decode_latents(x0).sum().backward()
    assert x0.grad.abs().sum() > 0


def test_it_predicts_in_its_own_dtype(folder):
    backbone = backbones.load(folder, torch_dtype=torch.bfloat16)
    times = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        prediction = backbone.predict(backbone.denoiser, _noise(backbone), times, _told(backbone, TWO))
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()


def test_what_is_drawn_is_what_the_pipeline_is_told(case, folder, backbone):
    stock = DiffusionPipeline.from_pretrained(folder)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    pictures = []
    for negative in ("", "a green square"):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        expected = stock(TWO, negative_prompt=[negative] * 2, generator=generators, **settings, **case.drawn).images
        asked = SamplingSettings(**settings, negative_prompt=negative)
        drawn = list(generate(backbone.pipeline(), TWO, [0, 1], asked, progress=False))
        assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
        pictures.append(drawn[0].tobytes())
    assert len(set(pictures)) == 2


def _with_lora(backbone, rank=4, alpha=8):
    denoiser = backbone.denoiser
    idle = backbone.idle_layers(denoiser)
    return adapters.add_lora(denoiser, rank, alpha=alpha, target_modules=backbone.lora_targets, idle=idle)


class TestLora:
    def test_every_adapter_gets_a_gradient(self, case, backbone):
        _with_lora(backbone)
        times = torch.tensor([300.0, 800.5])
        prediction = backbone.predict(backbone.denoiser, _noise(backbone), times, _told(backbone, ["a cat", PROMPT]))
        named = {name: p for name, p in backbone.denoiser.named_parameters() if "lora_B" in name}
        gradients = torch.autograd.grad((prediction - 1).square().mean(), list(named.values()))
        assert len(named) == case.layers
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_it_draws_the_same_in_the_stock_pipeline(self, folder, backbone, tmp_path, recwarn):
        perturb(_with_lora(backbone), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        assert all(name.startswith("transformer.") for name in load_file(file))
        stock = DiffusionPipeline.from_pretrained(folder)
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(folder).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]

    def test_that_of_another_family_is_refused(self, tiny_qwen, backbone, tmp_path):
        other = backbones.load(tiny_qwen)
        _with_lora(other)
        export.save_lora(other.denoiser, tmp_path)
        with pytest.raises(ModelError):
            export.load_adapter_into(backbone.pipeline(), tmp_path)

    def test_other_layouts_are_refused_by_name(self, backbone, tmp_path):
        _with_lora(backbone)
        with pytest.raises(ModelError, match="no layout of LoRAs is known but diffusers'"):
            export.save_kohya_lora(backbone.denoiser, tmp_path / "kohya.safetensors", "epsilon")


def test_a_whole_transformer_takes_the_place_of_the_base(folder, backbone, tmp_path):
    perturb(backbone.denoiser.parameters(), scale=0.02)
    export.save_denoiser(backbone.denoiser, tmp_path)
    loaded = export.load_adapter_into(loading.load(folder).pipeline(), tmp_path)
    torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=1e-6)
    continued = backbones.load(folder, unet_init=tmp_path)
    assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()


class TestGuidanceByTwoCalls:
    """Lumina2's pipeline evaluates the branches one after the other, and does not say which is which."""

    def _drawn(self, pipeline, scale=3.0):
        settings = SamplingSettings(height=64, width=64, num_inference_steps=2, guidance_scale=scale)
        return [picture.tobytes() for picture in generate(pipeline, TWO, [0, 1], settings, progress=False)]

    def test_the_second_of_a_step_is_the_negative_network(self, tiny_lumina2, tmp_path):
        backbone = backbones.load(tiny_lumina2)
        perturb(_with_lora(backbone), scale=0.2)
        export.save_lora(backbone.denoiser, tmp_path)
        base, calls = backbones.load(tiny_lumina2), []
        pipeline = with_negative_branch(base.pipeline(), tmp_path)
        probed = base.denoiser.layers[0].attn.to_q
        probed.register_forward_hook(lambda *_: calls.append(bool(active_adapters(base.denoiser))))
        assert self._drawn(pipeline) != self._drawn(backbones.load(tiny_lumina2).pipeline())
        assert calls == [False, True] * 2
        with pytest.raises(ModelError, match="The negative branch needs guidance"):
            self._drawn(pipeline, scale=1.0)

    def test_levels_of_all_sizes_are_moved_alike(self, tiny_lumina2):
        backbone = backbones.load(tiny_lumina2)
        assert backbone.shift_at(64).factor == 6.0
        config = {"use_dynamic_shifting": True}
        assert backbone.shift(config, 64).mu == pytest.approx(0.459375)  # of `mu_lumina2_channels` in flow.json
        assert backbone.shift(config, 4096) == backbone.shift(config, 64)


class TestDpmSolver:
    """SANA's folders name a multistep solver, whose path and shift are those of flow matching."""

    @pytest.mark.parametrize("kind", ["plain", "cfg"])
    @torch.no_grad()
    def test_three_steps_of_its_pipeline(self, tiny_sana, kind):
        backbone, records, case = backbones.load(tiny_sana), golden.load("flow_sana"), CASES["sana"]
        network, record = golden.network(case.network, records["backbone_sana"]), records["pipeline_sana_dpm"]
        scale = record["hyperparameters"]["guidance"][kind]["guidance_scale"]
        settings = record["hyperparameters"]["scheduler"]
        scheduler = DPMSolverMultistepScheduler.from_config(settings)
        scheduler.set_timesteps(3)
        cond, empty = _cond(case, 1010, record["inputs"]["mask"]), _cond(case, 1020, [[1] * 7] * 2)
        x = golden.fill((2, *case.latents), 1001, 1.5)
        for time in scheduler.timesteps:
            v, without = (backbone.predict(network, x, time.repeat(2), told) for told in (cond, empty))
            x = scheduler.step(without + scale * (v - without), time, x).prev_sample
        golden.assert_close(record, f"latents_{kind}", x)

    def test_its_ladder_is_moved_as_training_is(self, tiny_sana):
        record = golden.load("flow_sana")["ladder_dpm_flow_shift3_N20"]
        levels = torch.linspace(1 - 1 / 1000, 0, record["hyperparameters"]["steps"] + 1, dtype=torch.float64)
        shift = backbones.load(tiny_sana).shift_at(64)
        assert shift.factor == record["hyperparameters"]["flow_shift"]
        golden.assert_close(record, "sigmas", shift(levels))

    def test_of_another_path_it_is_refused(self, tiny_sana, tmp_path):
        copy = shutil.copytree(tiny_sana, tmp_path / "model")
        _change(copy / "scheduler" / "scheduler_config.json", use_flow_sigmas=False, prediction_type="epsilon")
        with pytest.raises(ModelError, match="is not one of flow matching, which sana was trained by"):
            loading.load(copy)


def _change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestWhatCannotBeTrained:
    @pytest.fixture
    def unread(self, folder, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(folder, tmp_path / "model")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    def _refused(self, folder, message, resolution=64):
        for refuse in (inspection.check, loading.load):
            with pytest.raises(ModelError, match=message):
                refuse(str(folder), resolution=resolution)

    def test_sides_that_no_whole_number_of_tokens_covers(self, unread, backbone):
        side = backbone.vae_scale_factor * backbone.patch_size(backbone.denoiser.config)
        self._refused(unread, f"multiples of {side} for this model, got 66x66", 66)

    def test_pictures_beyond_the_positions(self, tiny_lumina2):
        with pytest.raises(ModelError, match="of up to 128 pixels a side"):
            inspection.check(str(tiny_lumina2), 256)

    def test_folders_of_an_older_name(self, tiny_lumina2, tmp_path):
        copy = shutil.copytree(tiny_lumina2, tmp_path / "model")
        _change(copy / "model_index.json", _class_name="Lumina2Text2ImgPipeline")
        assert loading.load(copy, resolution=64).family == "lumina2"

    def test_without_its_text_encoder(self, unread):
        _change(unread / "model_index.json", text_encoder=[None, None])
        with pytest.raises(ModelError, match="names no text_encoder"):
            loading.load(unread, resolution=64)

    def test_another_text_encoder(self, unread):
        _change(unread / "model_index.json", text_encoder=["transformers", "Gemma2ForCausalLM"])
        with pytest.raises(ModelError, match="is a Gemma2ForCausalLM; supported: Gemma2Model"):
            loading.load(unread, resolution=64)

    @pytest.mark.parametrize(
        ("file", "changes", "message"),
        [
            ("transformer/config.json", {"guidance_embeds": True}, "as SANA-Sprint has, which is distilled"),
            ("scheduler/scheduler_config.json", {"prediction_type": "trigflow"}, "as SANA-Sprint has, which is"),
            ("model_index.json", {"_class_name": "SanaSprintPipeline"}, "which is distilled to draw in a few steps"),
            ("model_index.json", {"_class_name": "SanaVideoPipeline"}, "which makes films"),
        ],
    )
    @pytest.mark.parametrize("family", ["sana"], indirect=True)
    def test_sprint_and_films(self, unread, file, changes, message):
        _change(unread / file, **changes)
        self._refused(unread, message)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "sana"),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", "sana"),
        ("Alpha-VLLM/Lumina-Image-2.0", "lumina2"),
    ],
)
def test_hub_ids(name, family):
    inspection.check(name, 1024)
    assert inspection.transformer_family(name).family == family


def test_few_step_models_by_their_hub_ids():
    with pytest.raises(ModelError, match="distilled to draw in a few steps"):
        inspection.check("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", 1024)
