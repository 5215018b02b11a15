"""Whole runs of FLUX.2, klein and dev: the first logit is 0, runs resume, the stock pipeline draws what they leave."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign import config as configuration
from diffalign.backbones import loading
from diffalign.errors import UserError
from diffalign.evaluation import Manifest
from diffalign.jobs.training import meta_model, storage
from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.test_training import assert_same_bits, variant, weights

FULL = {"model": {"tune": "full"}, "optimizer": {"learning_rate": 1e-4}}


def _on(content, folder):
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(folder)
    return content


@pytest.fixture
def content(content, tiny_klein):
    """Return the configuration of the other tests, on FLUX.2-klein."""
    return _on(content, tiny_klein)


@pytest.mark.parametrize(("tune", "cache"), [("lora", True), ("lora", False), ("full", True)])
def test_the_first_logit_is_0_and_the_model_learns(content, run, tmp_path, tune, cache):
    sections = FULL if tune == "full" else {}
    changed = variant(content, tmp_path, "run", **sections, data={"cache_latents": cache}, train={"max_train_steps": 2})
    last = run(changed)
    first = metrics.read(Path(changed["train"]["output_dir"]) / "metrics.jsonl")[0]
    assert first["margin"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["kto", "inpo"])
def test_other_objectives_train_with_selective_recomputation(content, run, tmp_path, name):
    changed = variant(content, tmp_path, name, train={"max_train_steps": 2, "gradient_checkpointing": "selective"})
    changed["objective"] = {"name": name}
    changed["inversion"] = {"num_steps": 3}
    if name == "kto":
        del changed["inversion"]
    last = run(changed)
    assert math.isfinite(last["loss"])
    assert last["grad_norm"] > 0


@pytest.mark.parametrize("model", ["tiny_klein", "tiny_flux2_dev"])
def test_what_runs_leave_draws_in_the_stock_pipeline_and_resumes(content, run, tmp_path, request, model, diffalign):
    folder = request.getfixturevalue(model)
    whole = variant(_on(content, folder), tmp_path, "whole")
    run(whole)
    half = variant(whole, tmp_path, "half", train={"max_train_steps": 2})
    run(half)
    run(variant(whole, tmp_path, "half", train={"resume_from_checkpoint": "latest"}))
    assert_same_bits(weights(whole), weights(half))
    output, pictures = tmp_path / "whole", []
    assert metrics.read(output / "metrics.jsonl")[0]["margin"] == 0.0
    for place in (output, output / "checkpoint-4"):
        stock = DiffusionPipeline.from_pretrained(folder)
        base = draw(stock)
        stock.load_lora_weights(place)
        pictures.append(draw(stock))
        assert not torch.equal(pictures[-1], base)
    assert torch.equal(*pictures)
    assert f"{type(stock).__name__}.from_pretrained" in (output / "README.md").read_text()
    settings = ("--prompt", "a red circle", "--steps", 2, "--height", 64, "--width", 64)
    code, said = diffalign("generate", output, *settings, "--out", tmp_path / "drawn")
    assert code == 0, said
    assert len(Manifest.read(tmp_path / "drawn").paths) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolution": 60}}, "multiples of 8"),
    ],
)
def test_what_is_refused(content, run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(variant(content, tmp_path, "run", **changes))


def test_the_dry_run_counts_what_is_stored(content, tiny_klein):
    config = configuration.check(content)
    model, backbone = meta_model.read(config), loading.load(tiny_klein)
    with torch.no_grad():
        text = backbone.encode_prompts(["a red circle"])
    assert model.kind.prompt_size(model.denoiser.config) == sum(column.numel() for column in text.values())
    assert model.shift_at(64) == backbone.shift_at(64)
    assert meta_model.timesteps(config, model).startswith("uniform, shift 4.961 (mu 1.602")
    cache = storage.latent_cache(config, model, storage.Content(10, 2, 10))
    assert "latents of at most 20 images, 64.1 KiB each" in cache.what  # 2 x 32 x 16 x 16 numbers, also flipped
