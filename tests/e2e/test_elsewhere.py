"""A run folder is used from anywhere: by diffalign, which finds its base model, and by stock diffusers."""

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline

from diffalign import config as configuration
from diffalign.evaluation import SamplingSettings, generate
from diffalign.jobs.drawing import models
from diffalign.places import local

STEPS = SamplingSettings(num_inference_steps=3, guidance_scale=3.0, height=64, width=64)
PROMPT = "a red circle on a blue background"


@pytest.fixture
def own(tmp_path, tiny_sdxl, pairs_folder, content, monkeypatch):
    """Return a project folder with a model, pairs and a configuration that names them as they lie there."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_sdxl)
    (folder / "pairs").symlink_to(pairs_folder)
    content["model"]["pretrained_model_name_or_path"] = "./model"
    content["data"]["train_data_dir"] = "pairs"
    content["train"] |= {"output_dir": "runs/dpo", "max_train_steps": 2}
    (folder / "dpo.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_is_drawn_with_and_continued_from_another_folder(own, run, tmp_path, monkeypatch):
    run(configuration.load("dpo.yaml").model_dump())
    here = generate(models.load_pipeline("runs/dpo").pipeline, [PROMPT], [0], STEPS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = generate(models.load_pipeline(str(own / "runs" / "dpo")).pipeline, [PROMPT], [0], STEPS)
    assert np.array_equal(np.asarray(here[0]), np.asarray(there[0]))
    again = configuration.load(
        own / "runs" / "dpo" / "config.yaml", ["max_train_steps=3", "resume_from_checkpoint=latest"]
    )
    assert run(again.model_dump())["step"] == 3
    assert (own / "runs" / "dpo" / "checkpoint-3").is_dir()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_stock_diffusers_draws_with_a_run_on_the_embedded_model(run, tmp_path, monkeypatch):
    """Nobody names a dtype: the embedded model is stored in float16, and was once loaded half in it."""
    monkeypatch.chdir(tmp_path)
    overrides = ["max_train_steps=3", "lr_warmup_steps=0", "learning_rate=1e-2", "max_train_samples=16", "report_to=[]"]
    run(configuration.load("tiny/dpo", overrides).model_dump())
    pipeline = StableDiffusionXLPipeline.from_pretrained(local("assets/tiny-sdxl"))
    pipeline.set_progress_bar_config(disable=True)
    base, _ = drawn(pipeline), pipeline.load_lora_weights("runs/tiny-dpo")
    assert np.abs(drawn(pipeline) - base).mean() > 1e-3


def drawn(pipeline):
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]
