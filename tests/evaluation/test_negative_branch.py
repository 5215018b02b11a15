"""Diffusion-NPO's guidance: which network draws which half, what the negative one is, and what stays as it was."""

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import backbones
from diffalign.backbones.adapters import add_lora
from diffalign.backbones.export import save_denoiser, save_lora
from diffalign.backbones.files import LORA_FILE
from diffalign.errors import ModelError, UserError
from diffalign.evaluation import SamplingSettings, generate, with_negative_branch
from diffalign.evaluation.negative_branch import NegativeBranch, negative_weights
from tests import golden
from tests.backbones.drawing import draw, perturb

GOLDENS = golden.load("online")


class Constant(nn.Module):
    """Predict the same for anything."""

    def __init__(self, prediction, like):
        super().__init__()
        self.prediction, self.config, self.dtype, self.device = prediction, like.config, like.dtype, like.device

    def forward(self, sample, timestep, encoder_hidden_states, **options):
        assert sample.shape == self.prediction.shape
        return (self.prediction,)


class Recording(DDIMScheduler):
    """Keep the prediction that a step is made with."""

    def step(self, model_output, *args, **options):
        self.seen = model_output
        return super().step(model_output, *args, **options)


# A half by itself is rounded differently from the same half in a batch of two: measured 1e-6 of a picture in [0,1].
ROUNDING = 1e-5


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"], scope="module")
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipeline(folder):
    return backbones.load(folder).pipeline()


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """Return two LoRA folders of different ranks on different layers; treat them as read-only."""
    root = tmp_path_factory.mktemp("loras")
    for seed, (rank, targets) in enumerate([(2, ["to_q", "to_v"]), (4, ["to_k", "to_v", "proj_in"])]):
        denoiser = backbones.load(folder).denoiser
        perturb(add_lora(denoiser, rank, target_modules=targets), seed, scale=0.3)
        save_lora(denoiser, root / f"lora{seed}")
    return root / "lora0", root / "lora1"


def same(image, expected):
    return (image - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("name", [name for name in GOLDENS if name.startswith("npo_merge")])
def test_weights_are_those_of_the_authors(name):
    record = GOLDENS[name]
    base, policy, npo = (torch.tensor(record["inputs"][f"theta_{part}"]) for part in ("0", "pos", "npo"))
    options = record["hyperparameters"]
    policy_scale = options["alpha"] if "alpha" in options else 1 - options["merge_weight_mw"]
    merged = negative_weights(policy, base, npo, base, policy_scale, options.get("beta", 1.0))
    golden.assert_close(record, "theta_neg", merged)


def test_weights_without_differences_stay_to_the_last_bit():
    policy, base, npo = torch.randn(3, 1000)
    assert torch.equal(negative_weights(policy, base, npo, npo, 1.0, 1.0), policy)
    assert torch.equal(negative_weights(policy, base, npo, base, 1.0, 0.0), policy)
    assert torch.equal(negative_weights(policy, policy, npo, npo, 0.3, 1.0), policy)


@pytest.mark.parametrize("name", ["npo_cfg_w7.5", "npo_cfg_w5"])
def test_guidance_is_that_of_the_authors(name, tiny_sd15):
    record = GOLDENS[name]
    pipeline = backbones.load(tiny_sd15).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    negative, positive = (
        Constant(torch.tensor(record["inputs"][f"eps_{part}"]), pipeline.unet) for part in ("neg", "pos")
    )
    pipeline.register_modules(
        scheduler=Recording.from_config(pipeline.scheduler.config),
        unet=NegativeBranch(positive, negative, {}, {}, pipeline),
    )
    weight = record["hyperparameters"]["guidance_scale"]
    pipeline(["a", "b"], guidance_scale=weight, num_inference_steps=1, height=8, width=8, output_type="latent")
    golden.assert_close(record, "eps", pipeline.scheduler.seen)


def test_the_policy_as_negative_network_is_ordinary_guidance(pipeline, loras, monkeypatch):
    pipeline.load_lora_weights(loras[0])
    ordinary = draw(pipeline)
    image = draw(with_negative_branch(pipeline, loras[1], negative_scale=0))
    assert same(image, ordinary)

    forward = pipeline.unet.forward

    def one_by_one(sample, timestep, encoder_hidden_states, added_cond_kwargs, **options):
        added = [{k: v[row : row + 1] for k, v in (added_cond_kwargs or {}).items()} for row in (0, 1)]
        parts = [
            forward(
                sample[row : row + 1], timestep, encoder_hidden_states[row : row + 1], added_cond_kwargs=added[row]
            )[0]
            for row in (0, 1)
        ]
        return (torch.cat(parts),)

    monkeypatch.setattr(pipeline.unet, "forward", one_by_one)
    assert torch.equal(draw(pipeline), image)  # rounded the same way, not a bit is different


def test_the_policy_as_a_full_negative_network_is_ordinary_guidance(pipeline, folder, tmp_path):
    save_denoiser(backbones.load(folder).denoiser, tmp_path)
    branched = with_negative_branch(pipeline, tmp_path)
    assert branched.unet.networks[0] is not branched.unet.networks[1]
    assert same(draw(branched), draw(pipeline))


def test_pictures_follow_the_negative_network_and_its_scales(pipeline, loras):
    pipeline.load_lora_weights(loras[0])
    ordinary = draw(pipeline)
    images = [ordinary]
    for scales in ({}, {"negative_scale": 0.5}, {"policy_scale": 0.0}):
        branched = with_negative_branch(pipeline, loras[1], **scales)
        assert len(branched.unet.networks) == 1  # the weights are shared
        images.append(draw(branched))
    for index, image in enumerate(images):
        assert all((image - other).abs().max() > 1e-3 for other in images[:index])
    assert torch.equal(draw(pipeline), ordinary)  # the pipeline itself draws as before
    assert torch.equal(draw(with_negative_branch(pipeline, loras[1])), images[1])


def test_a_loras_own_weight_in_the_pipeline_counts(pipeline, loras):
    pipeline.load_lora_weights(loras[0], adapter_name="mine")
    pipeline.set_adapters(["mine"], [0.5])
    ordinary = draw(pipeline)
    assert same(draw(with_negative_branch(pipeline, loras[1], negative_scale=0)), ordinary)
    pipeline.disable_lora()
    base = draw(pipeline)
    assert (base - ordinary).abs().max() > 1e-3
    assert same(draw(with_negative_branch(pipeline, loras[1], negative_scale=0)), base)


def test_batches_are_split_and_pictures_do_not_depend_on_them(pipeline, loras):
    branched = with_negative_branch(pipeline, loras[0])
    prompts, seeds = ["a red circle", "a blue square", "two stars"], [1, 2, 3]
    pictures = [
        torch.stack([torch.tensor(list(image.tobytes())) for image in drawn])
        for size in (1, 3)
        for drawn in [
            generate(branched, prompts, seeds, SamplingSettings(num_inference_steps=2, batch_size=size), progress=False)
        ]
    ]
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_no_guidance_no_negative_branch(pipeline, loras):
    branched = with_negative_branch(pipeline, loras[0])
    settings = SamplingSettings(num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ModelError, match=r"guidance_scale must be above 1, got 1\.0"):
        generate(branched, ["a", "b"], [0, 1], settings, progress=False)


def test_what_cannot_be_a_negative_branch(pipeline, loras):
    for scales in ({"negative_scale": -1.0}, {"policy_scale": float("nan")}):
        with pytest.raises(UserError, match="must be a number of at least 0"):
            with_negative_branch(pipeline, loras[0], **scales)
    with pytest.raises(ModelError, match="has a negative branch already"):
        with_negative_branch(with_negative_branch(pipeline, loras[0]), loras[1])


def test_a_lora_of_text_encoders_is_refused_and_leaves_no_trace(pipeline, loras, tmp_path):
    before = draw(pipeline)
    tensors = load_file(loras[0] / LORA_FILE)
    width = pipeline.text_encoder.config.hidden_size
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(ModelError, match="trains text encoders"):
        with_negative_branch(pipeline, tmp_path)
    assert torch.equal(draw(pipeline), before)


def test_a_fused_lora_cannot_be_switched(pipeline, loras):
    pipeline.load_lora_weights(loras[0])
    pipeline.fuse_lora()
    with pytest.raises(ModelError, match="unfuse_lora"):
        with_negative_branch(pipeline, loras[1])
