"""Whole runs of a flow transformer: every kind of data, equal runs leave equal weights, and what is refused."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from diffalign.errors import ConfigError, UserError
from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.pairs import write_lists
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

FIRST = {"dpo": math.log(2), "ipo": 0.25, "kto": 0.5, "smpo": math.log(2)}
ASSETS = Path(__file__).parents[2] / "assets"
FULL = {"model": {"tune": "full"}, "optimizer": {"learning_rate": 1e-4}}


@pytest.fixture
def content(content, tiny_sd3):
    """Return the configuration of the other tests, on a flow transformer."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(tiny_sd3)
    return content


def first_step(changed):
    return metrics.read(Path(changed["train"]["output_dir"]) / "metrics.jsonl")[0]


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_first_logit_is_0_cached_or_not(content, run, tmp_path, tune, cache):
    sections = FULL if tune == "full" else {}
    changed = variant(content, tmp_path, "run", **sections, data={"cache_latents": cache}, train={"max_train_steps": 2})
    last = run(changed)
    assert first_step(changed)["margin"] == 0.0
    assert first_step(changed)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)


def test_cached_online_in_parts_and_resumed_runs_agree(content, run, tmp_path):
    whole = variant(content, tmp_path, "whole", data={"cache_dtype": "float32"})
    run(whole)
    parts = variant(whole, tmp_path, "parts", train={"train_batch_size": 1, "gradient_accumulation_steps": 4})
    run(parts)
    assert_close(weights(whole), weights(parts))
    online = variant(whole, tmp_path, "online", data={"cache_latents": False})
    run(online)
    assert_close(weights(whole), weights(online))
    half = variant(whole, tmp_path, "half", train={"max_train_steps": 2})
    run(half)
    run(variant(whole, tmp_path, "half", train={"resume_from_checkpoint": "latest"}))
    assert_same_bits(weights(whole), weights(half))


@pytest.mark.parametrize("name", ["ipo", "kto", "mapo", "smpo", "rankdpo"])
def test_every_kind_of_data_trains(content, run, tmp_path, name):
    changed = variant(content, tmp_path, name, train={"max_train_steps": 2})
    changed["objective"] = {"name": name}
    if name == "rankdpo":
        changed["data"]["train_data_dir"] = str(write_lists(tmp_path / "lists", 8, 3))
    if name == "smpo":
        changed["data"] |= {"scorer": f"pickscore={ASSETS / 'tiny-pickscore'}", "preference_from": "scores"}
        changed["inversion"] = {"num_steps": 3}
    last = run(changed)
    assert math.isfinite(last["loss"])
    assert last["grad_norm"] > 0
    if name in FIRST:
        assert first_step(changed)["loss"] == pytest.approx(FIRST[name], abs=1e-5)


def test_timesteps_follow_density_and_shift(content, run, tmp_path):
    runs = {
        "shifted": {},
        "unshifted": {"timestep_shift": 1.0},
        "logit_normal": {"timestep_density": "logit_normal", "logit_mean": -0.5},
        "list": {"timestep_density": "list", "timesteps": [801.0, 548.0]},
    }
    found = {}
    for name, denoising in runs.items():
        changed = variant(content, tmp_path, name, denoising=denoising, train={"max_train_steps": 1})
        run(changed)
        found[name] = first_step(changed)["policy_error"]
        identity = json.loads((tmp_path / name / "environment.json").read_text())["identity"]["denoising"]
        assert ("Shift(factor=3.0" in identity.get("timestep_sampling", "")) is (name != "unshifted")
    assert len(set(found.values())) == 4
    changed = variant(content, tmp_path, "shifted", denoising={"timestep_shift": 2.0}, train={"max_train_steps": 2})
    with pytest.raises(Exception, match="timestep_sampling"):
        run(changed | {"train": {**changed["train"], "resume_from_checkpoint": "latest"}})


class TestExports:
    def test_a_lora_and_its_checkpoint_draw_the_same_in_the_stock_pipeline(self, content, run, tiny_sd3):
        run(content)
        output = Path(content["train"]["output_dir"])
        pictures = []
        for place in (output, output / "checkpoint-4"):
            stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
            base = draw(stock)
            stock.load_lora_weights(place)
            pictures.append(draw(stock))
            assert not torch.equal(pictures[-1], base)
        assert torch.equal(*pictures)
        keys = load_file(output / "pytorch_lora_weights.safetensors").keys()
        assert all(key.startswith("transformer.transformer_blocks.") for key in keys)
        assert "StableDiffusion3Pipeline.from_pretrained" in (output / "README.md").read_text()

    def test_all_weights(self, content, run, tmp_path):
        changed = variant(content, tmp_path, "full", **FULL)
        run(changed)
        transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "full", subfolder="transformer")
        saved = weights(changed)
        assert all(torch.equal(parameter, saved[name]) for name, parameter in transformer.named_parameters())


class TestRefused:
    @pytest.mark.parametrize("name", ["spo", "ddpo", "draft"])
    def test_objectives_that_draw(self, content, run, name):
        content["objective"] = {"name": name}
        content["data"] = {"prompts_file": "assets/prompts/tiny-train.txt", "resolution": 64}
        content["rollout"] = {"scorer": "pickscore=assets/tiny-pickscore"}
        with pytest.raises(UserError, match=f'"{name}" learns from DDIM steps, and sd3 is sampled along a flow'):
            run(content)

    @pytest.mark.parametrize(
        ("section", "values", "message"),
        [
            ("lora", {"blocks": ["mid"]}, "names parts of a UNet"),
            ("performance", {"attention": "math"}, "performance.attention math is for the attention of UNets"),
            ("data", {"resolution": 60}, "multiples of 8"),
        ],
    )
    def test_settings_for_unets(self, content, run, tmp_path, section, values, message):
        with pytest.raises(UserError, match=message):
            run(variant(content, tmp_path, "run", **{section: values}))

    def test_a_shift_of_a_ddpm_schedule(self, content, run, tmp_path, tiny_sdxl):
        content["model"]["pretrained_model_name_or_path"] = str(tiny_sdxl)
        with pytest.raises(ConfigError, match="knows no shift of noise levels"):
            run(variant(content, tmp_path, "run", denoising={"timestep_shift": 3.0}))


@pytest.mark.parametrize(
    "sections",
    [
        {"reference": {"update": "ema", "decay": 0.9}},
        {"optimizer": {"use_ema": True}},
        {"reference": {"cache_draws": 2}},
        {"train": {"gradient_checkpointing": "selective"}},
        {"denoising": {"snr_weighting": "min_snr"}},
    ],
    ids=lambda sections: next(iter(next(iter(sections.values())))),
)
def test_what_surrounds_a_run_works(content, run, tmp_path, sections):
    changed = variant(content, tmp_path, "run", **sections)
    last = run(changed)
    assert first_step(changed)["margin"] == 0.0
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)
