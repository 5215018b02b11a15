"""PixArt-alpha and Sigma against golden records and the stock pipelines: prompts, sizes, trajectories, adapters."""

import copy
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from diffalign import backbones
from diffalign.backbones import Conditioning, adapters, export, inspection, loading, pixart
from diffalign.backbones.conditioning import MASK
from diffalign.backbones.families import BY_NAME
from diffalign.denoising import errors, guided
from diffalign.denoising.noising import with_noise
from diffalign.denoising.step import DenoisingOutputs
from diffalign.errors import ModelError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from tests import golden
from tests.backbones.drawing import PROMPT, perturb
from tests.tiny import build_tiny_pixart

RECORDS = golden.load("pixart")
PROMPTS = [PROMPT, "", "A Cat, on the photo! " * 60]
TWO = [PROMPT, "a cat"]
TIMES = torch.tensor([20, 990])
SIDES = {"height": 64, "width": 64}
STOCK = {**SIDES, "use_resolution_binning": False}  # as our own drawing asks for sizes


@pytest.fixture(params=["tiny_pixart_alpha", "tiny_pixart_sigma"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def backbone(folder):
    return backbones.load(folder)


@pytest.fixture
def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _noise(number=2, seed=3):
    return torch.randn(number, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def _told(backbone, prompts, height=64, width=64):
    sizes = torch.tensor([[999.0, 500, 3, 5, height, width]]).repeat(len(prompts), 1)
    with torch.no_grad():
        return backbone.condition(backbone.encode_prompts(prompts), sizes)


def _drawn(pipeline, **settings):
    return generate(pipeline, TWO, [0, 1], SamplingSettings(num_inference_steps=2, **SIDES, **settings), progress=False)


def _bytes(images):
    return [image.tobytes() for image in images]


def _as_stock_draws(stock, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return _bytes(stock(TWO, num_inference_steps=2, generator=generators, **STOCK, **settings).images)


class TestGoldens:
    def test_one_pass_and_its_error(self, tiny_pixart_sigma):
        record, backbone = RECORDS["backbone_pixart"], backbones.load(tiny_pixart_sigma)
        network = golden.network(PixArtTransformer2DModel, record)
        x0, noise = golden.fill((2, 4, 8, 8), 1000), golden.fill((2, 4, 8, 8), 1001, 1.5)
        problem = with_noise(backbone.path, x0, noise, torch.tensor(record["inputs"]["t"]))
        mask = torch.tensor(record["inputs"]["mask"]).bool()
        cond = Conditioning({"prompt_embeds": golden.fill((2, 7, 32), 1010), MASK: mask})
        pred = backbone.predict(network, problem.xt, problem.timesteps, cond)
        golden.assert_close(record, "noise_pred", pred)
        error = errors(DenoisingOutputs(policy=pred), problem)[0]
        golden.assert_close(record, "error", error)
        gradients = torch.autograd.grad(error.mean(), list(network.parameters()))
        golden.assert_close(record, "grad_norm_of_mean_error", torch.cat([g.flatten() for g in gradients]).norm())

    def test_the_variance_is_dropped(self, tiny_pixart_sigma):
        record, backbone = RECORDS["pixart_variance_split"], backbones.load(tiny_pixart_sigma)

        class Recorded(nn.Linear):  # a network that says what the record says
            def forward(self, *_, **__):
                return (torch.tensor(record["inputs"]["output"], dtype=torch.float64),)

        xt = torch.zeros(1, record["hyperparameters"]["latent_channels"], 2, 2)
        cond = _told(backbone, ["a"])
        golden.assert_close(record, "noise_pred", backbone.predict(Recorded(1, 1), xt, TIMES[:1], cond))


@torch.no_grad()
def test_prompts_equal_the_pipeline(stock, backbone):
    """At its own length; what is masked is zeros here, which no attention sees."""
    expected, mask, *_ = stock.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, clean_caption=True)
    text = backbone.encode_prompts(PROMPTS)
    assert tuple(text) == backbone.text_columns
    assert torch.equal(text[MASK], mask.bool())
    assert torch.equal(text["prompt_embeds"], expected * mask[..., None])
    kept = mask.sum(1).tolist()
    assert kept[1] < kept[0] < kept[2] == {"pixart-alpha": 120, "pixart-sigma": 300}[backbone.family]
    assert sum(column[0].numel() for column in text.values()) == backbone.prompt_size(backbone.denoiser.config)
    assert backbone.prompt_tokens(backbone.tokenizers, PROMPTS) == sum(kept)


@torch.no_grad()
def test_prompts_are_cleaned_where_both_packages_are_there(stock, backbone, monkeypatch):
    """Beautiful Soup is not among what is tested with; what the pipeline does then is its own code."""
    seen = []
    monkeypatch.setattr(
        type(stock), "_text_preprocessing", lambda _, texts, clean_caption: seen.append(clean_caption) or texts
    )
    plain = backbone.fingerprint()
    for cleans in (True, False):
        monkeypatch.setattr(pixart, "CLEANS", cleans)
        backbone.encode_prompts(["a"])
        assert backbone.drawing_options(stock)["clean_caption"] is cleans
    assert seen == [True, False]
    monkeypatch.setattr(pixart, "CLEANS", True)
    assert backbone.fingerprint() != plain


@torch.no_grad()
def test_one_call_equals_the_stock_pipelines(stock, backbone):
    """Also of a picture that is not square, whose size the network of 1024 pixels is told."""
    seen = []
    stock.transformer.register_forward_hook(
        lambda _, inputs, told, output: seen.append((told, output)), with_kwargs=True
    )
    latents = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "use_resolution_binning": False}
    stock(TWO, latents=latents, height=64, width=48, output_type="latent", **options)
    told, output = seen[0]
    cond = _told(backbone, TWO, 64, 48)
    prediction = backbone.predict(backbone.denoiser, latents, told["timestep"], cond)
    assert output[0].shape[1] == 8
    assert torch.equal(prediction, output[0][:, :4])
    wanted = {name: value for name, value in told["added_cond_kwargs"].items() if value is not None}
    assert set(wanted) == set(cond.columns) - set(backbone.text_columns)
    assert len(wanted) == (2 if backbone.family == "pixart-alpha" else 0)
    for name, value in wanted.items():
        torch.testing.assert_close(cond[name], value)
        other = Conditioning({**cond.columns, name: cond[name] * 3})
        assert not torch.equal(backbone.predict(backbone.denoiser, latents, told["timestep"], other), prediction)


@torch.no_grad()
def test_a_whole_trajectory_equals_the_stock_pipeline(stock, backbone):
    expected = stock(TWO, latents=_noise(), num_inference_steps=5, output_type="pt", guidance_scale=4.5, **STOCK).images
    cond, empty, x = _told(backbone, TWO), _told(backbone, [""]), _noise()
    scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
    scheduler.set_timesteps(5)

    def predict(xt, timesteps, cond):
        return backbone.predict(backbone.denoiser, xt, timesteps, cond)

    for step in scheduler.timesteps:
        noise = guided(predict, x, step.repeat(2), cond, empty, 4.5)
        x = scheduler.step(noise, step, x, return_dict=False)[0]
    torch.testing.assert_close(backbone.decode_latents(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_noise_levels_are_the_schedulers(stock, backbone):
    x0, noise, times = _noise(seed=1), _noise(seed=2), torch.tensor([0, 999])
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    problem = with_noise(backbone.path, x0, noise, times)
    torch.testing.assert_close(problem.xt, scheduler.add_noise(x0, noise, times))
    assert torch.equal(problem.target, noise)
    assert backbone.path.alpha_sigma(times[1:])[0].item() == pytest.approx(0.0063527, rel=1e-4)  # linear 1e-4 to 0.02


@torch.no_grad()
def test_masked_text_and_other_examples_have_no_influence(backbone):
    prompts, times = [PROMPT, "a cat", "a"], torch.tensor([20, 500, 990])
    cond = _told(backbone, prompts)
    spoilt = cond["prompt_embeds"].masked_fill(~cond[MASK][..., None], 7.0)
    told = [cond, Conditioning({**cond.columns, "prompt_embeds": spoilt})]
    plain, other = (backbone.predict(backbone.denoiser, _noise(3), times, entry) for entry in told)
    assert torch.equal(plain, other)
    alone = backbone.predict(backbone.denoiser, _noise(3)[1:2], times[1:2], cond.select([1]))
    torch.testing.assert_close(alone, plain[1:2], rtol=1e-4, atol=1e-5)
    swapped = backbone.predict(backbone.denoiser, _noise(3), times, cond.select([1, 2, 0]))
    assert (swapped - plain).abs().amax((1, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_pictures_are_scaled_as_the_pipeline_decodes_them(backbone):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean, std = backbone.encode_images(images)
    posterior = backbone.vae.encode(images * 2 - 1).latent_dist
    factor = {"pixart-alpha": 0.18215, "pixart-sigma": 0.13025}[backbone.family]
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(std, posterior.std * factor)


def test_it_predicts_in_its_own_dtype_and_is_told_exact_sizes(folder):
    backbone = backbones.load(folder, torch_dtype=torch.bfloat16)
    cond = _told(backbone, TWO, 1023, 511).to(dtype=torch.bfloat16)
    assert "resolution" not in cond.columns or cond["resolution"].tolist() == [[1023, 511]] * 2
    with torch.no_grad():
        prediction = backbone.predict(backbone.denoiser, _noise(), TIMES, cond)
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()


def test_sizes_are_asked_for(tiny_pixart_alpha):
    backbone = backbones.load(tiny_pixart_alpha)
    for sizes in (None, torch.zeros(2, 4)):
        with pytest.raises(ModelError, match="is told the size of the picture"):
            backbone.condition(backbone.encode_prompts(TWO), sizes)


class TestDrawing:
    def test_it_draws_what_the_stock_pipeline_draws(self, stock, backbone):
        assert _bytes(_drawn(backbone.pipeline(), guidance_scale=4.5)) == _as_stock_draws(stock, guidance_scale=4.5)
        drawn = _bytes(_drawn(stock, negative_prompt="a green square"))
        assert drawn == _as_stock_draws(stock, guidance_scale=5.0, negative_prompt=["a green square"] * 2)
        assert drawn != _bytes(_drawn(stock))

    def test_a_negative_branch(self, backbone, tmp_path):
        perturb(_with_lora(backbone), scale=0.3)
        export.save_lora(backbone.denoiser, tmp_path)
        pipeline = backbones.load(backbone.source).pipeline()
        plain = _drawn(pipeline)
        branched = with_negative_branch(pipeline, tmp_path, negative_scale=1.0)
        assert _bytes(_drawn(branched)) != _bytes(plain)
        unchanged = with_negative_branch(backbones.load(backbone.source).pipeline(), tmp_path, negative_scale=0.0)
        for image, expected in zip(_drawn(unchanged), plain, strict=True):  # each half alone: rounding
            assert np.abs(np.asarray(image, float) - np.asarray(expected)).max() <= 1
        for prompts, seeds in ((TWO, [0, 1]), (TWO[:1], [0])):
            settings = SamplingSettings(guidance_scale=1.0, num_inference_steps=2, **SIDES)
            with pytest.raises(ModelError, match="The negative branch needs guidance"):
                generate(branched, prompts, seeds, settings, progress=False)


def _with_lora(backbone, rank=4, alpha=8):
    denoiser = backbone.denoiser
    idle = backbone.idle_layers(denoiser)
    return adapters.add_lora(denoiser, rank, alpha=alpha, target_modules=backbone.lora_targets, idle=idle)


class TestLora:
    def test_every_adapter_gets_a_gradient(self, backbone):
        _with_lora(backbone)
        prediction = backbone.predict(backbone.denoiser, _noise(), TIMES, _told(backbone, TWO))
        named = {name: p for name, p in backbone.denoiser.named_parameters() if "lora_B" in name}
        gradients = torch.autograd.grad((prediction - 1).square().mean(), list(named.values()))
        assert len(named) == 2 * (2 * 4 + 2)  # two attentions and a feed-forward network a block
        assert min(gradient.abs().max().item() for gradient in gradients) > 0

    def test_it_draws_the_same_in_the_stock_pipeline(self, stock, backbone, tmp_path):
        """Which has no loader of LoRAs: the transformer is given diffusers' methods for adapters, as cards say."""
        perturb(_with_lora(backbone), scale=0.2)
        file = export.save_lora(backbone.denoiser, tmp_path, "some/base")
        assert all(name.startswith("transformer.transformer_blocks.") for name in load_file(file))
        base = _as_stock_draws(stock)
        exec("\n".join(backbone.lora_usage(str(tmp_path))), {"diffusers": diffusers, "pipe": stock})
        drawn = _as_stock_draws(stock)
        assert drawn == _bytes(_drawn(backbone.pipeline(), guidance_scale=4.5)) != base
        loaded = export.load_adapter_into(loading.load(backbone.source).pipeline(), tmp_path)
        assert _bytes(_drawn(loaded, guidance_scale=4.5)) == drawn
        export.unload_adapters(loaded)
        assert _bytes(_drawn(loaded, guidance_scale=4.5)) == base

    def test_its_class_keeps_its_name(self, backbone, tmp_path):
        _with_lora(backbone)
        twin = copy.deepcopy(backbone.denoiser)
        assert isinstance(twin, PixArtTransformer2DModel)
        twin.save_config(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "PixArtTransformer2DModel"

    def test_other_layouts_are_refused(self, backbone, tmp_path):
        _with_lora(backbone)
        for write in (export.save_kohya_lora, export.save_comfy_lora):
            with pytest.raises(ModelError, match="no layout of LoRAs is known but diffusers'"):
                write(backbone.denoiser, tmp_path / "lora.safetensors")

    def test_that_of_another_family_is_refused(self, tiny_sd3, tiny_sdxl, folder, tmp_path):
        for name in (tiny_sd3, tiny_sdxl):
            other = backbones.load(name)
            export_folder = tmp_path / other.family
            _with_lora(other)
            export.save_lora(other.denoiser, export_folder)
            with pytest.raises(ModelError):
                export.load_adapter_into(backbones.load(folder).pipeline(), export_folder)


def test_gradient_checkpointing_gives_the_same_gradients(backbone):
    trained, cond = _with_lora(backbone), _told(backbone, TWO)
    perturb(trained)
    found = []
    for enabled in (False, True):
        if enabled:
            backbone.denoiser.enable_gradient_checkpointing()
        loss = backbone.predict(backbone.denoiser.train(), _noise(), TIMES, cond).square().mean()
        found.append(torch.autograd.grad(loss, trained))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_whole_transformer_takes_the_place_of_the_base(backbone, folder, tmp_path):
    perturb(backbone.denoiser.parameters(), scale=0.02)
    export.save_denoiser(backbone.denoiser, tmp_path)
    loaded = export.load_adapter_into(loading.load(folder).pipeline(), tmp_path)
    assert _bytes(_drawn(loaded)) == _bytes(_drawn(backbone.pipeline()))
    continued = backbones.load(folder, unet_init=tmp_path)
    assert continued.denoiser_fingerprint() == backbone.denoiser_fingerprint()


def test_those_of_the_other_generation_are_refused(tiny_pixart_alpha, tiny_pixart_sigma, tmp_path):
    sigma = build_tiny_pixart(tmp_path / "sigma", "sigma", use_additional_conditions=False)
    with pytest.raises(ModelError, match="use_additional_conditions"):
        export.load_adapter_into(loading.load(tiny_pixart_alpha).pipeline(), sigma / "transformer")


def test_configurations_that_name_the_class_of_old_are_read(tiny_pixart_alpha, tmp_path):
    """Those of PixArt-alpha on the hub, from before it had a class of its own, with settings that are no longer any."""
    folder = shutil.copytree(tiny_pixart_alpha, tmp_path / "PixArt-XL-2-1024-MS")
    for file, changes in {
        "transformer/config.json": {"_class_name": "Transformer2DModel", "num_vector_embeds": None},
        "model_index.json": {"transformer": ["diffusers", "Transformer2DModel"]},
    }.items():
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    backbone = loading.load(folder, resolution=64)
    assert type(backbone.denoiser) is PixArtTransformer2DModel
    assert backbone.denoiser_fingerprint() == backbones.load(tiny_pixart_alpha).denoiser_fingerprint()


class TestWhatCannotBeTrained:
    @pytest.fixture
    def broken(self, folder, tmp_path):
        """Return a copy of the folder in which every file of weights is broken: whoever reads one fails."""
        copied = shutil.copytree(folder, tmp_path / "PixArt-XL-2")
        for file in copied.rglob("*.safetensors"):
            file.write_bytes(b"no weights")
        return copied

    @staticmethod
    def _change(file, **changes):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    @pytest.mark.parametrize("name", ["PixArt-LCM-XL-2-1024-MS", "PixArt-Alpha-DMD-XL-2-512x512"])
    def test_distilled_ones_by_their_names(self, broken, name):
        with pytest.raises(ModelError, match="Learning from given pictures by denoising would undo that"):
            inspection.check(f"PixArt-alpha/{name}", 1024)
        with pytest.raises(ModelError, match="distilled to draw in a few steps"):
            loading.load(broken.rename(broken.parent / name), resolution=64)

    def test_lcm_by_its_scheduler(self, broken):
        self._change(broken / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
        with pytest.raises(ModelError, match=r"\(LCMScheduler\) is distilled"):
            loading.load(broken, resolution=64)

    def test_resolutions(self, broken):
        with pytest.raises(ModelError, match="multiples of 8 for this model, got 60x60"):
            loading.load(broken, resolution=60)

    def test_networks_that_their_pipeline_leaves_without_sizes(self, broken):
        self._change(broken / "transformer" / "config.json", use_additional_conditions=True, sample_size=64)
        with pytest.raises(ModelError, match="does not tell a network of sample_size 64: it could not draw"):
            loading.load(broken, resolution=64)

    def test_schedules_of_another_path(self, folder, tmp_path):
        flow = shutil.copytree(folder, tmp_path / "flow")
        shutil.rmtree(flow / "scheduler")
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(flow / "scheduler")
        self._change(flow / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
        with pytest.raises(ModelError, match="no DDPM noise schedule"):
            loading.load(flow)

    def test_missing_encoders(self, broken):
        self._change(broken / "model_index.json", text_encoder=[None, None])
        with pytest.raises(ModelError, match="names no text_encoder"):
            loading.load(broken, resolution=64)


@pytest.mark.parametrize(
    ("hub_id", "family"),
    [
        ("PixArt-alpha/PixArt-XL-2-1024-MS", "pixart-alpha"),
        ("PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", "pixart-sigma"),
        ("stabilityai/stable-diffusion-xl-base-1.0", None),
    ],
)
def test_hub_ids_name_the_generation(hub_id, family):
    assert inspection.transformer_family(hub_id) is BY_NAME.get(family)
