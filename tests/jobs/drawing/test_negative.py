"""Whatever names the negative network, it is theta_0 + a (theta_pos - theta_0) + b (theta_npo - theta_0)."""

import functools
import shutil

import pytest
import torch

from diffalign import backbones
from diffalign.errors import ModelError, UserError
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.negative import Negative, NegativeLoader, loader
from tests.backbones.drawing import draw
from tests.jobs.material import write_run

POLICY_SCALE, NEGATIVE_SCALE = 0.5, 0.75
ALPHA = 0.4  # stronger LoRAs saturate the attention of a tiny UNet, and rounding decides what it predicts


# Every way in which weights come, each at least once; the first pair in both families.
PAIRS = [
    ("tiny_sdxl", "dpo", "npo"),
    ("tiny_sd15", "dpo", "npo"),
    ("tiny_sdxl", "dpo/checkpoint-3", "npo/checkpoint-3"),
    ("tiny_sdxl", "dpo", "npo-full/checkpoint-3"),
    ("tiny_sdxl", "dpo-full", "npo/checkpoint-3"),
    ("tiny_sd15", "dpo-full", "npo-full"),
]


@functools.cache
def make_runs(base, root):
    """Write a LoRA run and a run of all weights, as policies and as negatives; treat them as read-only."""
    names = [("dpo", "lora"), ("npo", "lora"), ("dpo-full", "full"), ("npo-full", "full")]
    return {name: write_run(root / name, base, tune, seed, ALPHA) for seed, (name, tune) in enumerate(names)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("negative-runs")


@pytest.fixture
def base(tiny_sdxl):
    return tiny_sdxl


@pytest.fixture
def runs(base, root):
    return make_runs(base, root / "tiny_sdxl")


def load(model, negative, base=None, **scales):
    (wanted,) = models.resolve([str(model)], base, base_is_used=True)
    return NegativeLoader(Negative(str(negative), **scales), base, device="cpu").load(wanted)


def dense(spec):
    """Return a model's UNet with its LoRA in its weights."""
    pipeline = models.load_pipeline(str(spec), device="cpu").pipeline
    if getattr(pipeline.unet, "peft_config", {}):
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline.unet


def inputs_of(unet, size=4):
    """Return what a pipeline gives its UNet for `size` rows of a doubled batch."""
    inputs = {
        "sample": torch.randn(size, 4, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(size, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(size, 32), "time_ids": 64.0 * torch.ones(size, 6)}
    return inputs


def rows(inputs, chosen):
    return {
        key: rows(value, chosen) if isinstance(value, dict) else value[chosen] if value.ndim else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize(("family", "policy", "negative"), PAIRS)
@torch.no_grad()
def test_halves_are_those_of_the_formula(family, policy, negative, root, request):
    base, root = request.getfixturevalue(family), root / family
    make_runs(base, root)
    loaded = load(root / policy, root / negative, policy_scale=POLICY_SCALE, negative_scale=NEGATIVE_SCALE)
    loaded.pipeline._guidance_scale = 5.0
    zero, positive, npo = (dense(spec) for spec in (base, root / policy, root / negative))
    expected = dense(base)
    weights = (network.state_dict().values() for network in (expected, zero, positive, npo))
    for weight, start, up, down in zip(*weights, strict=True):
        weight.copy_(start + POLICY_SCALE * (up - start) + NEGATIVE_SCALE * (down - start))
    inputs = inputs_of(zero)
    got = loaded.pipeline.unet(**inputs).sample
    for half, network in ((slice(0, 2), expected), (slice(2, 4), positive)):
        wanted = network(**rows(inputs, half)).sample
        torch.testing.assert_close(got[half], wanted, rtol=1e-4, atol=1e-4)
    assert (expected(**inputs).sample - positive(**inputs).sample).abs().max() > 0.01


def test_a_lora_goes_on_any_positive_model_and_a_unet_brings_its_base(runs, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "fine-tuned")  # a whole model, as a user downloads it
    with torch.no_grad():
        unet = dense(runs["dpo-full"].folder)
        unet.save_pretrained(other / "unet")
    images = {}
    for negative in ("npo", "npo-full"):
        images[negative] = draw(load(other, runs[negative].folder).pipeline)
        again = draw(load(runs["dpo-full"].folder, runs[negative].folder).pipeline)  # its delta is known here
        assert (images[negative] - again).abs().max() < 1e-4
    assert (images["npo"] - images["npo-full"]).abs().max() > 1e-3


def test_the_base_is_left_as_it_was(runs, base):
    plain = draw(backbones.load(base).pipeline())
    loading = NegativeLoader(Negative(str(runs["npo"].folder)), device="cpu")
    wanted = models.resolve([str(runs["dpo"].folder), str(runs["dpo-full"].folder), str(base)])
    first = draw(loading.load(wanted[0]).pipeline)
    draw(loading.load(wanted[1]).pipeline)
    draw(loading.load(wanted[2]).pipeline)
    assert torch.equal(draw(loading.load(wanted[0]).pipeline), first)
    assert torch.equal(draw(models.ModelLoader.load(loading, wanted[2]).pipeline), plain)


def test_identity_follows_the_negative_network_and_its_scales(runs, base, tmp_path):
    model, negative = runs["dpo"].folder, runs["npo"].folder
    other = write_run(tmp_path / "npo", base, seed=9)
    identities = [
        models.load_pipeline(str(model), device="cpu").identity,
        load(model, negative).identity,
        load(model, negative, negative_scale=0.5).identity,
        load(model, negative, policy_scale=0.5).identity,
        load(model, other.folder).identity,
        load(model, runs["npo-full"].folder).identity,
        load(runs["npo"].folder, model).identity,
    ]
    assert len(set(identities)) == len(identities)
    assert identities[1].startswith("dpo (float32, weights ")
    assert identities[1].endswith("), negative branch npo x 1.0, policy x 1.0")
    assert load(model, negative).identity == identities[1]


def test_what_is_no_negative_network(runs, base, tmp_path):
    for spec in (base, tmp_path / "missing"):
        with pytest.raises(ModelError, match=r"is no LoRA, UNet or training run|There is no model at"):
            load(runs["dpo"].folder, spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        load(runs["dpo"].folder, tmp_path / "empty")


def test_options_without_an_effect_are_refused(runs, base):
    assert isinstance(loader(None, device="cpu"), models.ModelLoader)
    assert Negative.of(None, 1.0, 1.0) is None
    with pytest.raises(UserError, match=r"--negative-scale 0\.5 has no effect without --negative-lora"):
        Negative.of(None, 0.5, 1.0)
    with pytest.raises(UserError, match="--policy-scale must be a number of at least 0, got -1"):
        Negative.of("runs/npo", 1.0, -1.0)
    negative = Negative(str(runs["npo"].folder), policy_scale=0.5)
    with pytest.raises(UserError, match=r"--policy-scale 0\.5 has no effect: .* is a whole model"):
        negative.check(5.0, models.resolve([str(base)]))
    negative.check(5.0, models.resolve([str(base), str(runs["dpo"].folder)]))
