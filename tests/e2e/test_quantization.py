"""Whole LoRA runs over a base in few bits: the first logit, resuming, the stock pipeline, and what is refused."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign import config as configuration
from diffalign.backbones import quantization
from diffalign.errors import ConfigError
from diffalign.jobs.training import distributed, preflight
from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.test_ranks import launch_train
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

LOG_2 = torch.tensor(math.log(2)).item()  # in float32, as the loss is


@pytest.fixture(params=["int8", "fp8", "nf4"])
def kind(request):
    pytest.importorskip(quantization.PACKAGES[request.param])
    return request.param


@pytest.fixture
def content(content, tiny_sd3):
    """Return the configuration of a run in bfloat16 on a flow transformer."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    content["train"]["mixed_precision"] = "bf16"
    return content


def losses(changed):
    return [line["loss"] for line in metrics.read(Path(changed["train"]["output_dir"]) / "metrics.jsonl")]


def test_a_run_starts_at_log_2_resumes_and_leaves_a_lora_for_the_stock_pipeline(content, run, tmp_path, kind, tiny_sd3):
    whole = variant(content, tmp_path, "whole", model={"quantization": kind})
    run(whole)
    assert losses(whole)[0] == LOG_2
    assert losses(whole)[-1] != LOG_2
    half = variant(whole, tmp_path, "half", train={"max_train_steps": 2})
    run(half)
    resumed = {"train": {"resume_from_checkpoint": "latest"}}
    run(variant(whole, tmp_path, "half", **resumed))
    assert_same_bits(weights(whole), weights(half))
    with pytest.raises(Exception, match=r"model\.quantization"):
        run(variant(whole, tmp_path, "half", model={"quantization": "none"}, **resumed))
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    base = draw(stock)
    stock.load_lora_weights(tmp_path / "whole")
    assert not torch.equal(draw(stock), base)


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_unet_trains_with_its_convolutions_as_they_were(content, run, tmp_path, kind, tiny_sdxl, recomputed):
    model = {"pretrained_model_name_or_path": str(tiny_sdxl), "quantization": kind}
    train = {"max_train_steps": 2, "gradient_checkpointing": recomputed}
    changed = variant(content, tmp_path, "run", model=model, train=train)
    assert run(changed)["grad_norm"] > 0
    assert losses(changed)[0] == LOG_2
    assert losses(changed)[1] != LOG_2


def test_cached_errors_of_the_reference_are_those_of_the_same_base(content, run, tmp_path, kind):
    folders = set()
    for name, how in (("plain", "none"), ("quantised", kind), ("again", kind)):
        changed = variant(content, tmp_path, name, model={"quantization": how}, reference={"cache_draws": 1})
        changed["train"]["max_train_steps"] = 2
        changed["data"]["cache_dir"] = str(tmp_path / "cache")
        run(changed)
        assert losses(changed)[0] == LOG_2
        folders |= set((tmp_path / "cache").glob("reference-*/identity.json"))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"tune": "full"}}, 'model.quantization "nf4" freezes the weights'),
        ({"performance": {"reference_dtype": "fp8", "compile": "full"}}, "copies the base"),
    ],
)
def test_what_cannot_go_together_is_refused(content, tmp_path, sections, said):
    model = {"quantization": "nf4", **sections.get("model", {})}
    with pytest.raises(ConfigError, match=said):
        configuration.check(variant(content, tmp_path, "run", **(sections | {"model": model})))


@pytest.mark.slow
def test_two_processes_train_what_one_does(content, run, tmp_path, kind):
    one = variant(content, tmp_path, "one", model={"quantization": kind}, train={"mixed_precision": "no"})
    run(one)
    two = variant(one, tmp_path, "two", train={"train_batch_size": 2})
    launch_train("ddp", two, tmp_path / "two.yaml")
    assert losses(two)[0] == LOG_2
    assert_close(weights(one), weights(two))


@pytest.mark.parametrize("launcher", ["sharding", "zero"])
def test_bases_in_few_bits_are_not_cut_into_shards(content, tmp_path, monkeypatch, launcher):
    config = configuration.check(variant(content, tmp_path, "run", model={"quantization": "int8"}))
    monkeypatch.setattr(distributed.zero, "check", lambda precision: None)
    monkeypatch.setattr(distributed.sharding, "check", lambda precision: None)
    monkeypatch.setattr(getattr(distributed, launcher), "wanted", lambda accelerator: True)
    with pytest.raises(ConfigError, match=r'model\.quantization "int8" does not work with .* Use none'):
        distributed.check(config, accelerator=None)


def test_a_missing_package_is_a_fault_of_the_run(content, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    config = configuration.check(variant(content, tmp_path, "run", model={"quantization": "nf4"}))
    faults = [str(fault) for fault in preflight.packages(config)]
    assert any('needs bitsandbytes: pip install "diffalign[quant]"' in fault for fault in faults)
