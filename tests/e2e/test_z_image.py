"""Whole runs of the families with masked texts, Z-Image and others: the first logit, what is left."""

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffalign import config as configuration
from diffalign.backbones import inspection
from diffalign.data import Augmentation
from diffalign.jobs.training import assemble, examples
from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

FULL = {"model": {"tune": "full"}, "optimizer": {"learning_rate": 1e-4}}


@pytest.fixture(params=["tiny_zimage", "tiny_qwen", "tiny_sana", "tiny_lumina2", "tiny_pixart_alpha"])
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


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_runs_are_to_the_bit_what_they_are_with_padding_in_the_cache(content, run, tmp_path, monkeypatch, tune):
    sections = FULL if tune == "full" else {}
    losses, trained = [], []
    for name in ("short", "padded"):
        changed = variant(content, tmp_path, name, **sections, data={"cache_dir": str(tmp_path / f"cache-{name}")})
        changed["train"] |= {"max_train_steps": 2}
        run(changed)
        losses.append([line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl")])
        trained.append(weights(changed, 2))
        family = inspection.family_at(content["model"]["pretrained_model_name_or_path"])
        monkeypatch.setattr(family, "token_columns", ())
        monkeypatch.setattr(family, "ignores_padding", False)
    assert losses[0] == losses[1]
    assert losses[0][1] != pytest.approx(math.log(2), abs=1e-5)
    assert_same_bits(*trained)
    short, padded = (_bytes_of_text(tmp_path / f"cache-{name}") for name in ("short", "padded"))
    assert short < padded / 2


def _bytes_of_text(directory):
    return sum(file.stat().st_size for file in directory.glob("*/prompt_*.npy"))


def test_prompts_in_half_precision_are_those_of_no_cache(content, tmp_path):
    # Encoders in bfloat16, as of a LoRA run: kept like that, float16 would round what is small.
    content = variant(content, tmp_path, "run", train={"mixed_precision": "bf16"})
    online = variant(content, tmp_path, "online", data={"cache_latents": False})
    batches = []
    for changed in (content, online):
        config = configuration.check(changed)
        backbone = assemble.load_backbone(config)
        pairs = examples.open_encoded(config, backbone, examples.open_source(config), Accelerator(cpu=True))
        batches.append(pairs.batch([0, 5], lambda ids: Augmentation(ids < 0, ids < 0)))
    cached, encoded = (batch.text["prompt_embeds"] for batch in batches)
    assert encoded.shape[1] == backbone.padded_length
    assert (cached.shape[1] < encoded.shape[1]) == backbone.ignores_padding
    # Qwen-Image pads to the longest prompt of what is encoded at once, which moves the last bits.
    tolerance = 2**-6 if backbone.family == "qwen" else 0
    torch.testing.assert_close(cached, encoded[:, : cached.shape[1]], rtol=tolerance, atol=tolerance)
    assert not encoded[:, cached.shape[1] :].any()


@pytest.mark.parametrize("model", ["tiny_zimage", "tiny_qwen", "tiny_sana", "tiny_lumina2"], indirect=True)
def test_the_lora_of_a_run_draws_in_the_stock_pipeline(content, run, model):
    run(content)
    output = Path(content["train"]["output_dir"])
    stock = DiffusionPipeline.from_pretrained(model)
    base = draw(stock)
    stock.load_lora_weights(output)
    assert not torch.equal(draw(stock), base)
    assert f"{type(stock).__name__}.from_pretrained" in (output / "README.md").read_text()
