"""Z-Image against golden records and diffusers' own pipeline: prompts, one pass, a whole trajectory, adapters."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading
from diffalign.backbones.conditioning import MASK
from diffalign.denoising import errors, guided
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError
from tests import golden
from tests.backbones.drawing import PROMPT, draw, perturb

RECORDS = golden.load("flow_zimage")
PROMPTS = [PROMPT, "", "a cat, on the photo! " * 30]


@pytest.fixture
def backbone(tiny_zimage):
    return backbones.load(tiny_zimage)


@pytest.fixture(scope="module")
def network():
    """Return the transformer of the records, its weights a formula."""
    return golden.network(ZImageTransformer2DModel, RECORDS["backbone_zimage"])


def _cond(stream, mask):
    return Conditioning({"prompt_embeds": golden.fill((2, 7, 16), stream), MASK: torch.tensor(mask).bool()})


def _noise(number=2, seed=3):
    return torch.randn(number, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def _told(backbone, prompts):
    with torch.no_grad():
        return backbone.condition(backbone.encode_prompts(prompts), None)


class TestGoldens:
    def test_one_pass_and_its_error(self, backbone, network):
        record = RECORDS["backbone_zimage"]
        x0, noise = golden.fill((2, 16, 8, 8), 1000), golden.fill((2, 16, 8, 8), 1001, 1.5)
        problem = with_noise(backbone.path, x0, noise, 1000 * torch.tensor(record["inputs"]["s"]))
        velocity = backbone.predict(network, problem.xt, problem.timesteps, _cond(1010, record["inputs"]["mask"]))
        golden.assert_close(record, "velocity", velocity)
        error = errors(DenoisingOutputs(policy=velocity), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()))
        golden.assert_close(record, "grad_norm_of_mean_error", torch.cat([g.flatten() for g in gradients]).norm())

    @pytest.mark.parametrize("kind", ["plain", "cfg"])
    @torch.no_grad()
    def test_three_steps_of_its_pipeline(self, backbone, network, kind):
        record = RECORDS["pipeline_zimage"]
        scale = 1 + record["hyperparameters"]["guidance"][kind]["guidance_scale"]  # theirs counts from 0
        cond, empty = _cond(1010, record["inputs"]["mask"]), _cond(1020, [[1] * 7] * 2)
        x = golden.fill((2, 16, 8, 8), 1001, 1.5)
        for here, there in pairwise(torch.tensor(record["expected"]["sigmas"])):
            timesteps = (1000 * here).repeat(2)
            v, without = (backbone.predict(network, x, timesteps, told) for told in (cond, empty))
            x = x + (there - here) * (without + scale * (v - without))
        golden.assert_close(record, f"latents_{kind}", x)


@torch.no_grad()
def test_prompts_equal_the_pipeline(tiny_zimage, backbone):
    expected, _ = ZImagePipeline.from_pretrained(tiny_zimage).encode_prompt(
        list(PROMPTS), device="cpu", do_classifier_free_guidance=False
    )
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    kept = [len(states) for states in expected]
    assert text[MASK].sum(1).tolist() == kept
    assert kept[1] < kept[0] < kept[2] == 512
    for states, mask, wanted in zip(text["prompt_embeds"], text[MASK], expected, strict=True):
        assert torch.equal(states[mask], wanted)
        assert not states[~mask].any()
    assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)


@torch.no_grad()
def test_one_call_equals_the_stock_pipelines(tiny_zimage, backbone):
    stock, seen = ZImagePipeline.from_pretrained(tiny_zimage), []
    stock.transformer.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output[0])))
    stock.set_progress_bar_config(disable=True)
    stock([PROMPT, "a cat"], latents=_noise(), num_inference_steps=1, guidance_scale=0.0, height=64, width=64)
    (_, time, _), output = seen[0]
    prediction = backbone.predict(backbone.denoiser, _noise(), 1000 * (1 - time), _told(backbone, [PROMPT, "a cat"]))
    assert torch.equal(prediction, -torch.cat([entry[None, :, 0] for entry in output]))


@torch.no_grad()
def test_a_whole_trajectory_equals_the_stock_pipeline(tiny_zimage, backbone):
    stock = ZImagePipeline.from_pretrained(tiny_zimage)
    stock.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
    expected = stock([PROMPT, "a cat"], latents=_noise(), **settings).images
    cond, empty, x = _told(backbone, [PROMPT, "a cat"]), _told(backbone, [""]), _noise()

    def velocity(xt, timesteps, cond):
        return backbone.predict(backbone.denoiser, xt, timesteps, cond)

    for here, there in pairwise(stock.scheduler.sigmas):
        x = x + (there - here) * guided(velocity, x, (1000 * here).repeat(2), cond, empty, 5.0)
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.shift_at(64)(torch.linspace(1, 1 / 5, 5)), stock.scheduler.sigmas[:-1])
    torch.testing.assert_close(draw(backbone.pipeline()), draw(stock), rtol=0, atol=1e-6)


@torch.no_grad()
def test_masked_text_and_other_examples_have_no_influence(backbone):
    prompts, times = [PROMPT, "a cat", "a"], torch.tensor([20.0, 500.5, 990.0])
    cond = _told(backbone, prompts)
    spoilt = cond["prompt_embeds"].masked_fill(~cond[MASK][..., None], float("nan"))
    told = [cond, Conditioning({"prompt_embeds": spoilt, MASK: cond[MASK]})]
    plain, other = (backbone.predict(backbone.denoiser, _noise(3), times, entry) for entry in told)
    assert torch.equal(plain, other)
    alone = backbone.predict(backbone.denoiser, _noise(3)[1:2], times[1:2], cond.select([1]))
    torch.testing.assert_close(alone, plain[1:2], rtol=1e-4, atol=1e-5)
    swapped = backbone.predict(backbone.denoiser, _noise(3), times, cond.select([1, 2, 0]))
    assert (swapped - plain).abs().amax((1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_pictures_are_shifted_and_scaled_as_the_pipeline_decodes_them(backbone):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = backbone.encode_images(images)
    posterior = backbone.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1159) * 0.3611)
    torch.testing.assert_close(std, posterior.std * 0.3611)


def test_it_predicts_in_its_own_dtype(tiny_zimage):
    backbone = backbones.load(tiny_zimage, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        prediction = backbone.predict(
            backbone.denoiser, _noise(), torch.tensor([10.0, 900.0]), _told(backbone, ["a", PROMPT])
        )
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()


def test_the_fingerprint_knows_the_chat_template(tiny_zimage, backbone):
    before = backbone.fingerprint()
    other = backbones.load(tiny_zimage)
    assert other.fingerprint() == before
    other = backbones.load(tiny_zimage)
    other.tokenizers[0].chat_template += "!"
    assert other.fingerprint() != before


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
        assert len(named) == 7 * 4  # seven layers of two blocks, of a refiner of pictures and of one of text
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_it_draws_the_same_in_the_stock_pipeline(self, tiny_zimage, backbone, tmp_path, recwarn):
        perturb(_with_lora(backbone), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        names = ("layers.", "noise_refiner.", "context_refiner.")
        assert all(name.startswith(tuple(f"transformer.{part}" for part in names)) for name in load_file(file))
        stock = ZImagePipeline.from_pretrained(tiny_zimage)
        base = draw(stock)
        stock.load_lora_weights(tmp_path)
        image = draw(stock)
        torch.testing.assert_close(image, draw(backbone.pipeline()), rtol=0, atol=1e-5)
        assert (image - base).abs().max() > 0.01
        loaded = export.load_adapter_into(loading.load(tiny_zimage).pipeline(), tmp_path)
        torch.testing.assert_close(draw(loaded), image, rtol=0, atol=1e-6)
        assert not [str(w.message) for w in recwarn if "modules" in str(w.message)]


def test_a_whole_transformer_takes_the_place_of_the_base(tiny_zimage, backbone, tmp_path):
    perturb(backbone.denoiser.parameters(), scale=0.02)
    export.save_denoiser(backbone.denoiser, tmp_path)
    loaded = export.load_adapter_into(loading.load(tiny_zimage).pipeline(), tmp_path)
    torch.testing.assert_close(draw(loaded), draw(backbone.pipeline()), rtol=0, atol=1e-6)
    continued = backbones.load(tiny_zimage, unet_init=tmp_path)
    assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()


class TestWhatCannotBeTrained:
    @pytest.fixture
    def folder(self, tiny_zimage, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copy = shutil.copytree(tiny_zimage, tmp_path / "Z-Image")
        for file in copy.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copy

    def test_turbo(self, folder):
        turbo = folder.rename(folder.parent / "Z-Image-Turbo")
        for refuse in (inspection.check, loading.load):
            arguments = {"resolution": 64}
            with pytest.raises(ModelError, match=r"distilled to draw in a few steps.*would undo that"):
                refuse(str(turbo), **arguments)
        with pytest.raises(ModelError, match="distilled to draw in a few steps"):
            inspection.check("Tongyi-MAI/Z-Image-Turbo", 1024)
        inspection.check("Tongyi-MAI/Z-Image", 1024)

    @pytest.mark.parametrize(
        ("resolution", "message"), [(60, "multiples of 8 for this model, got 60x60"), (256, "of up to 128 pixels")]
    )
    def test_resolutions(self, folder, resolution, message):
        with pytest.raises(ModelError, match=message):
            loading.load(folder, resolution=resolution)

    def test_networks_that_look_at_pictures(self, folder):
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"siglip_feat_dim": 8}))
        with pytest.raises(ModelError, match=r"looks at pictures too .*use the text-to-image model"):
            loading.load(folder, resolution=64)
