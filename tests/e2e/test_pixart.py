"""Whole runs of PixArt, a transformer on DDPM's path: what only UNets could until now, and what is left and refused."""

import copy
import math
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from diffalign.backbones import export, loading
from diffalign.errors import UserError
from diffalign.evaluation import Manifest
from diffalign.jobs.training import static
from diffalign.training import metrics
from tests.e2e.test_methods import ASSETS, ROLLOUT
from tests.e2e.test_training import assert_same_bits, variant, weights
from tests.training.tape import Tape

PROMPT = "a red circle on a blue background"
SIDES = {"height": 64, "width": 64}
STOCK = {**SIDES, "num_inference_steps": 2, "use_resolution_binning": False, "output_type": "pt"}


@pytest.fixture
def content(content, tiny_pixart_sigma):
    """Return the configuration of the other tests, on PixArt-Sigma."""
    content = copy.deepcopy(content)
    content["model"]["pretrained_model_name_or_path"] = str(tiny_pixart_sigma)
    content["inversion"] = {"num_steps": 3}
    return content


@pytest.fixture
def online(content):
    """Return a function that makes the configuration of two steps of an objective that draws."""

    def make(name, **rollout):
        content["objective"] = {"name": name}
        content["data"] = {"prompts_file": str(ASSETS / "prompts" / "tiny-train.txt"), "resolution": 64}
        content["rollout"] = ROLLOUT | {"samples_per_prompt": 2, "transitions_per_prompt": 2} | rollout
        content["train"] |= {"train_batch_size": 2, "max_train_steps": 2}
        return content

    return make


def _draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(7), **STOCK).images


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"name": "inpo"}},
        {"denoising": {"noising": "renoise_inversion"}},
        {"denoising": {"snr_weighting": "min_snr"}},
        {"denoising": {"timestep_density": "logit_normal"}},
        {"reference": {"update": "ema", "decay": 0.9}},
        {"reference": {"cache_draws": 2}},
        {"optimizer": {"use_ema": True}},
        {"train": {"gradient_checkpointing": "selective"}},
    ],
    ids=lambda sections: "-".join(f"{key}" for values in sections.values() for key in values.values()),
)
def test_what_is_of_ddpm_works_on_a_transformer(content, run, tmp_path, sections):
    changed = variant(content, tmp_path, "run", **sections)
    last = run(changed)
    assert metrics.read(tmp_path / "run" / "metrics.jsonl")[0]["margin"] == 0.0
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["spo", "d3po", "ddpo", "draft"])
@pytest.mark.parametrize("generation", ["tiny_pixart_sigma", "tiny_pixart_alpha"])
def test_objectives_that_draw(online, run, name, generation, request):
    content = online(name)
    content["model"]["pretrained_model_name_or_path"] = str(request.getfixturevalue(generation))
    line = run(content)
    assert all(math.isfinite(value) for value in line.values())
    moved = [tensor for key, tensor in weights(content, 2).items() if "lora_B" in key]
    assert max(tensor.abs().max() for tensor in moved) > 1e-4


@pytest.mark.parametrize("model", ["tiny_pixart_sigma", "tiny_sana"])
def test_static_steps_hold_masks(content, run, tmp_path, monkeypatch, model, request):
    content["model"]["pretrained_model_name_or_path"] = str(request.getfixturevalue(model))
    made = []

    class Noted(Tape):
        def record(self, function):
            made.append(function)
            return super().record(function)

    monkeypatch.setattr(static, "recorder", Noted)
    eager, replayed = (variant(content, tmp_path, name, performance={"cuda_graphs": name}) for name in ("none", "step"))
    run(eager)
    assert not made
    run(replayed)
    assert len(made) == 1
    assert_same_bits(weights(eager), weights(replayed))


class TestWhatARunLeaves:
    @pytest.mark.parametrize("tune", ["lora", "full"])
    def test_the_card_puts_it_into_the_stock_pipeline(self, content, run, tmp_path, tiny_pixart_sigma, tune):
        changed = variant(content, tmp_path, "run", model={"tune": tune}, optimizer={"learning_rate": 1e-2})
        run(changed)
        card = (tmp_path / "run" / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        assert "PixArtSigmaPipeline.from_pretrained" in code
        code = code.replace(f'"{tiny_pixart_sigma.name}"', repr(str(tiny_pixart_sigma)))
        told = {"diffusers": diffusers}
        exec(code.replace("path/to/this/folder", str(tmp_path / "run")), told)
        base = _draw(PixArtSigmaPipeline.from_pretrained(tiny_pixart_sigma))
        drawn = _draw(told["pipe"])
        assert (drawn - base).abs().max() > 1e-3
        loaded = export.load_adapter_into(loading.load(tiny_pixart_sigma).pipeline(), tmp_path / "run")
        torch.testing.assert_close(_draw(loaded), drawn, rtol=0, atol=1e-5)

    def test_commands_draw_it_and_merge_it(self, content, run, tmp_path, tiny_pixart_sigma, diffalign):
        run(content)
        output, out = Path(content["train"]["output_dir"]), tmp_path / "pictures"
        code, said = diffalign("generate", output, "--prompt", PROMPT, "--steps", 2, "--out", out, "--height", 64)
        assert code == 0, said
        assert len(Manifest.read(out).paths) == 1
        told = ["--prompt", PROMPT, "--seeds", 0, "--steps", 2, "--out", tmp_path / "grid.png", "--height", 64]
        code, said = diffalign("grid", output, output / "checkpoint-2", "--show-base", *told)
        assert code == 0, said
        assert "1 rows of 3 pictures" in said
        code, said = diffalign("export", output, "--format", "unet", "--out", tmp_path / "merged")
        assert code == 0, said
        stock = PixArtSigmaPipeline.from_pretrained(tiny_pixart_sigma)
        stock.transformer = PixArtTransformer2DModel.from_pretrained(tmp_path / "merged" / "transformer")
        loaded = export.load_adapter_into(loading.load(tiny_pixart_sigma).pipeline(), output)
        torch.testing.assert_close(_draw(stock), _draw(loaded), rtol=0, atol=1e-5)
        code, said = diffalign("export", output, "--format", "kohya", "--out", tmp_path / "kohya")
        assert code == 2
        assert "no layout of LoRAs is known but diffusers'" in said


class TestRefused:
    def test_judges_made_of_a_unet(self, online, run):
        with pytest.raises(UserError, match="is half of a UNet, and pixart-sigma has none"):
            run(online("spo", scorer=f"lrm={ASSETS / 'tiny-lrm'}"))

    def test_training_such_a_judge(self, tiny_pixart_sigma, pairs_folder, tmp_path, diffalign):
        told = ["--model", tiny_pixart_sigma, "--out", tmp_path / "lrm"]
        code, said = diffalign("reward", "train", "lrm", pairs_folder, *told)
        assert code == 2
        assert "lrm is the first half of a UNet, and pixart-sigma" in said

    @pytest.mark.parametrize(
        ("section", "values", "message"),
        [
            ("lora", {"blocks": ["mid"]}, "names parts of a UNet"),
            ("lora", {"export_kohya": True}, "no layout of LoRAs is known but diffusers'"),
            ("performance", {"attention": "math"}, "performance.attention math is for the attention of UNets"),
            ("data", {"resolution": 60}, "multiples of 8"),
            ("denoising", {"timestep_shift": 3.0}, "knows no shift of noise levels"),
        ],
    )
    def test_settings(self, content, run, tmp_path, section, values, message):
        with pytest.raises(UserError, match=message):
            run(variant(content, tmp_path, "run", **{section: values}))


def test_the_pipelines_have_no_loader_of_their_own():
    """Should diffusers give them one, cards and export may say so, as of the other families."""
    assert not any(hasattr(pipeline, "load_lora_weights") for pipeline in (PixArtAlphaPipeline, PixArtSigmaPipeline))
