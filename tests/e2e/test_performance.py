"""Every option of `performance` trains the weights that the plain run does, up to rounding."""

import pytest
import torch

from diffalign.backbones import adapters
from diffalign.backbones.families import denoiser_of
from diffalign.denoising import acceleration, kernels
from diffalign.jobs.drawing import models
from diffalign.training import metrics
from tests.e2e.test_training import assert_close, variant, weights

COMPILE = torch.compile
BF16 = {"mixed_precision": "bf16"}
INPO = {"objective": {"name": "inpo", "beta": 2000.0}, "inversion": {"num_steps": 2}}
PLAIN = {"fused_lora": False, "share_text": False, "channels_last": False}


@pytest.fixture
def plain(content, run, tmp_path):
    """Return the weights of a run with nothing switched on."""
    slow = variant(content, tmp_path, "plain", performance=PLAIN)
    run(slow)
    return weights(slow)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("performance", {"channels_last": True}),
        ("performance", {"fused_lora": True, "share_text": False}),
        ("performance", {"fused_lora": False, "share_text": True}),
        ("performance", {"attention": "math"}),
        ("performance", {"attention": "auto"}),
        ("train", {"gradient_checkpointing": "selective"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_an_option_changes_rounding_only(content, run, tmp_path, plain, section, options):
    fast = variant(content, tmp_path, "fast", **{section: options})
    run(fast)
    assert metrics.read(tmp_path / "fast" / "metrics.jsonl")[0]["margin"] == 0.0
    assert_close(plain, weights(fast))


def test_fused_activations_train_the_same_bits(content, run, tmp_path, plain, monkeypatch):
    used, functions = set(), {name: getattr(kernels, name) for name in ("geglu", "group_norm_silu")}
    for name, function in functions.items():
        monkeypatch.setattr(kernels, name, lambda *args, key=name, call=function: used.add(key) or call(*args))
    fast = variant(content, tmp_path, "fast", performance=PLAIN | {"fused_activations": True})
    run(fast)
    assert used == functions.keys()
    trained = weights(fast)
    assert trained.keys() == plain.keys()
    assert all(torch.equal(trained[name], value) for name, value in plain.items())


@pytest.mark.parametrize("how", ["regional", pytest.param("full", marks=pytest.mark.slow)])
def test_compiled(content, run, tmp_path, plain, monkeypatch, how):
    """The graphs are those of torch.compile; aot_eager runs them without the minutes that code generation takes."""

    def compile_with(function, fullgraph, mode):
        return COMPILE(function, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(acceleration.torch, "compile", compile_with)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = variant(content, tmp_path, "fast", performance={"compile": how})
    run(fast)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # policy and reference
    assert abs(metrics.read(tmp_path / "fast" / "metrics.jsonl")[0]["margin"]) < 1e-6
    assert_close(plain, weights(fast))


def test_pure_bf16_is_as_close_to_float32_as_autocast_is(content, run, tmp_path, plain):
    distances = {}
    for name, pure in (("autocast", False), ("pure", True)):
        half = variant(content, tmp_path, name, train=BF16, performance={"pure_bf16": pure})
        run(half)
        lines = metrics.read(tmp_path / name / "metrics.jsonl")
        assert lines[0]["margin"] == 0.0
        trained = weights(half)
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        distances[name] = sum((trained[key] - plain[key]).square().sum().item() for key in plain)
    assert 0 < distances["pure"] < 2 * distances["autocast"]


def test_adapters_behind_the_encoder_share_it(content, run, tmp_path):
    behind = variant(content, tmp_path, "behind", lora={"blocks": ["mid", "up"]})
    run(behind)
    assert metrics.read(tmp_path / "behind" / "metrics.jsonl")[0]["margin"] == 0.0
    trained = weights(behind)
    assert not any("down_blocks" in name for name in trained)
    assert max(t.abs().max().item() for name, t in trained.items() if "lora_B" in name) > 1e-3
    for place in (tmp_path / "behind" / "checkpoint-4", tmp_path / "behind"):
        (model,) = models.resolve([str(place)])
        loaded = models.ModelLoader("float32", "cpu").load(model)
        carried = adapters.adapted_layers(denoiser_of(loaded.pipeline), "default_0")
        assert 2 * len(carried) == len(trained)


def test_inversions_in_lower_precision(content, run, tmp_path):
    for name, options in (("plain", {}), ("half", {"sampling_dtype": "bf16"})):
        run(variant(content, tmp_path, name, performance=options, **INPO))
    first, second = (metrics.read(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "half"))
    assert first["margin"] == second["margin"] == 0.0  # policy and reference still agree
    assert first["policy_error"] != second["policy_error"]
    assert second["policy_error"] == pytest.approx(first["policy_error"], rel=0.05)


def test_a_reference_in_lower_precision(content, run, tmp_path):
    run(variant(content, tmp_path, "half", performance={"reference_dtype": "bf16"}))
    margin = metrics.read(tmp_path / "half" / "metrics.jsonl")[0]["margin"]
    assert 0 < abs(margin) < 1e-3
