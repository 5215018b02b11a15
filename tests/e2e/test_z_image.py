"""Whole runs of the families with masked texts, Z-Image, Qwen-Image and PixArt: the first logit, what is left."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

FULL = {"model": {"tune": "full"}, "optimizer": {"learning_rate": 1e-4}}


@pytest.fixture(params=["tiny_zimage", "tiny_qwen", "tiny_pixart_alpha"])
def model(request):
    """Return the folder of a model."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def content(content, model):
    """Return the configuration of the other tests, on this model."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(model)
    return content


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_first_logit_is_0_cached_or_not(content, run, tmp_path, tune, cache):
    sections = FULL if tune == "full" else {}
    changed = variant(content, tmp_path, "run", **sections, data={"cache_latents": cache}, train={"max_train_steps": 2})
    last = run(changed)
    first = metrics.read(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["margin"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)


def test_cached_and_online_runs_in_parts_agree(content, run, tmp_path):
    whole = variant(content, tmp_path, "whole", data={"cache_dtype": "float32"})
    run(whole)
    for name, changes in {
        "parts": {"train": {"train_batch_size": 1, "gradient_accumulation_steps": 4}},
        "online": {"data": {"cache_latents": False}},
        "recomputed": {"train": {"gradient_checkpointing": True}},
    }.items():
        other = variant(whole, tmp_path, name, **changes)
        run(other)
        assert_close(weights(whole), weights(other))


def test_a_run_goes_on_where_it_stopped(content, run, tmp_path):
    whole = variant(content, tmp_path, "whole")
    run(whole)
    half = variant(whole, tmp_path, "half", train={"max_train_steps": 2})
    run(half)
    run(variant(whole, tmp_path, "half", train={"resume_from_checkpoint": "latest"}))
    assert_same_bits(weights(whole), weights(half))


@pytest.mark.parametrize("model", ["tiny_zimage", "tiny_qwen"], indirect=True)
def test_the_lora_of_a_run_draws_in_the_stock_pipeline(content, run, model):
    run(content)
    output = Path(content["train"]["output_dir"])
    stock = DiffusionPipeline.from_pretrained(model)
    base = draw(stock)
    stock.load_lora_weights(output)
    assert not torch.equal(draw(stock), base)
    assert f"{type(stock).__name__}.from_pretrained" in (output / "README.md").read_text()
