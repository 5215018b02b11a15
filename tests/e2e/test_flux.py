"""Whole runs of FLUX.1: the first logit is 0, runs resume, the stock pipeline draws with what they leave."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from diffalign import config as configuration
from diffalign.backbones import loading
from diffalign.errors import UserError
from diffalign.evaluation import Manifest, SamplingSettings, generate
from diffalign.jobs.scoring.implicit import ImplicitReward
from diffalign.jobs.training import meta_model, storage
from diffalign.training import metrics
from tests.backbones.drawing import draw
from tests.e2e.pairs import write_lists
from tests.e2e.test_training import assert_same_bits, variant, weights

ASSETS = Path(__file__).parents[2] / "assets"
FULL = {"model": {"tune": "full"}, "optimizer": {"learning_rate": 1e-4}}


@pytest.fixture
def content(content, tiny_flux):
    """Return the configuration of the other tests, on FLUX.1."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(tiny_flux)
    return content


@pytest.mark.parametrize(("tune", "cache"), [("lora", True), ("lora", False), ("full", True)])
def test_the_first_logit_is_0_and_the_model_learns(content, run, tmp_path, tune, cache):
    sections = FULL if tune == "full" else {}
    changed = variant(content, tmp_path, "run", **sections, data={"cache_latents": cache}, train={"max_train_steps": 2})
    last = run(changed)
    first = metrics.read(Path(changed["train"]["output_dir"]) / "metrics.jsonl")[0]
    assert first["margin"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["kto", "rankdpo", "smpo"])
def test_other_kinds_of_data_train(content, run, tmp_path, name):
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


def test_the_implicit_reward_is_that_of_the_run(content, run, tiny_flux):
    run(content)
    scorer = ImplicitReward(content["train"]["output_dir"], "cpu", num_draws=2)
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=3.5, height=64, width=64)
    image = generate(loading.load(tiny_flux).pipeline(), ["a red circle"], [3], settings, progress=False)[0]
    assert scorer.score([image], ["a red circle"]).abs().item() > 1e-3
    with torch.no_grad():
        for name, weight in scorer.policy.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert scorer.score([image], ["a red circle"]).item() == 0.0


def test_what_runs_leave_draws_in_the_stock_pipeline_and_resumes(content, run, tmp_path, tiny_flux, diffalign):
    whole = variant(content, tmp_path, "whole")
    run(whole)
    half = variant(whole, tmp_path, "half", train={"max_train_steps": 2})
    run(half)
    run(variant(whole, tmp_path, "half", train={"resume_from_checkpoint": "latest"}))
    assert_same_bits(weights(whole), weights(half))
    output, pictures = tmp_path / "whole", []
    for place in (output, output / "checkpoint-4"):
        stock = FluxPipeline.from_pretrained(tiny_flux)
        base = draw(stock)
        stock.load_lora_weights(place)
        pictures.append(draw(stock))
        assert not torch.equal(pictures[-1], base)
    assert torch.equal(*pictures)
    assert "FluxPipeline.from_pretrained" in (output / "README.md").read_text()
    settings = ("--prompt", "a red circle", "--steps", 2, "--height", 64, "--width", 64)
    code, said = diffalign("generate", output, *settings, "--out", tmp_path / "drawn")
    assert code == 0, said
    assert len(Manifest.read(tmp_path / "drawn").paths) == 1
    code, said = diffalign("generate", output, *settings, "--negative-prompt", "blur", "--out", tmp_path / "other")
    assert code == 2
    assert "negative prompt has no effect" in said


def test_all_weights_are_saved(content, run, tmp_path):
    changed = variant(content, tmp_path, "full", **FULL)
    run(changed)
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "full", subfolder="transformer")
    saved = weights(changed)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in transformer.named_parameters())


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_layers_that_a_run_names(content, run, tmp_path, checkpointing):
    lora = {"lora_target_modules": ["to_q", "ff.net.2", "proj_out"]}
    changed = variant(content, tmp_path, "run", lora=lora, train={"gradient_checkpointing": checkpointing})
    assert run(changed)["grad_norm"] > 0
    adapted = {name.split(".lora_")[0] for name in weights(changed)}
    assert {name for name in adapted if name.endswith("proj_out")} == {
        f"transformer.single_transformer_blocks.{block}.proj_out" for block in (0, 1)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolution": 60}}, "multiples of 8"),
        ({"objective": {"name": "spo"}, "rollout": {"scorer": "pickscore=assets/tiny-pickscore"}}, "flux is sampled"),
    ],
)
def test_what_is_refused(content, run, tmp_path, changes, message):
    if "rollout" in changes:
        content["data"] = {"prompts_file": "assets/prompts/tiny-train.txt", "resolution": 64}
        content |= changes
        changes = {}
    with pytest.raises(UserError, match=message):
        run(variant(content, tmp_path, "run", **changes))


def test_the_dry_run_counts_what_is_stored(content, tiny_flux):
    config = configuration.check(content)
    model, backbone = meta_model.read(config), loading.load(tiny_flux)
    with torch.no_grad():
        text = backbone.encode_prompts(["a red circle"])
    assert model.kind.prompt_size(model.denoiser.config) == sum(column.numel() for column in text.values())
    assert model.shift_at(64) == backbone.shift_at(64)
    assert meta_model.timesteps(config, model).startswith("uniform, shift 1.596 (mu 0.467")
    cache = storage.latent_cache(config, model, storage.Content(10, 2, 10))
    assert "latents of at most 20 images, 32.1 KiB each" in cache.what  # 2 x 16 x 16 x 16 numbers, also flipped
