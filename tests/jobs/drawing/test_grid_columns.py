"""`diffalign grid`: what its columns are; a LoRA at scale 0 is its base; checkpoints come in order of steps."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.backbones.files import LORA_FILE
from diffalign.errors import UserError
from diffalign.evaluation import Manifest, SamplingSettings
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.grid import draw
from diffalign.jobs.drawing.grid_columns import Sweep, checkpoints_of, swept
from diffalign.shapes.captions import parse
from diffalign.shapes.render import render
from diffalign.training import checkpoint

PROMPTS = [
    "two red circles on a blue background",
    "three green squares on a white background",
    "a small yellow star on the left on a black background",
    "a pink diamond on a gray background",
]
SETTINGS = SamplingSettings(num_inference_steps=2)


def draw_folder(folder, captions):
    """Render captions into a folder as `diffalign generate` would for PROMPTS, and return it."""
    requested = pd.DataFrame({"prompt_id": range(len(PROMPTS)), "prompt": PROMPTS, "seed": 0})
    manifest = Manifest.plan(folder, requested, settings={}, identity=folder.name)
    for number, (path, caption) in enumerate(zip(manifest.paths, captions, strict=True)):
        render(parse(caption), random.Random(number)).save(path)
    return folder


def test_names_and_settings_of_a_sweep():
    wanted = [models.Model("dpo", models.Base("b"), "lora"), models.Model("base", models.Base("b"))]
    columns = swept(wanted, SETTINGS, Sweep.parse("guidance_scale=1,7.5"))
    assert [column.name for column in columns] == [
        "dpo, guidance scale 1",
        "dpo, guidance scale 7.5",
        "base, guidance scale 1",
        "base, guidance scale 7.5",
    ]
    assert [column.settings.guidance_scale for column in columns] == [1, 7.5, 1, 7.5]
    columns = swept(wanted, SETTINGS, Sweep.parse("lora_scale=0,2"))
    assert [(c.name, c.lora_scale) for c in columns] == [
        ("dpo, lora scale 0", 0),
        ("dpo, lora scale 2", 2),
        ("base", 1),
    ]
    (column,) = swept(wanted[:1], SETTINGS, Sweep.parse("steps=5"))
    assert (column.name, column.settings.num_inference_steps) == ("steps 5", 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance=1", 'Did you mean "guidance_scale"'),
        ("guidance_scale=1,x", "takes numbers between commas"),
        ("steps=2.5", "whole numbers"),
        ("lora_scale=1,1", "names a value twice"),
    ],
)
def test_sweeps_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        Sweep.parse(text)


def test_a_scale_needs_a_lora():
    with pytest.raises(UserError, match="none of the models is a LoRA"):
        swept([models.Model("base", models.Base("b"))], SETTINGS, Sweep.parse("lora_scale=1"))


def test_checkpoints_in_order_of_their_steps(tmp_path):
    for step in (20, 3, 100):
        checkpoint.save(tmp_path / "run", step, {}, {}, {}, None)
    (tmp_path / "run" / "checkpoint-7").mkdir()
    names = [spec.partition("=")[0] for spec in checkpoints_of([str(tmp_path / "run")])]
    assert names == ["step 3", "step 20", "step 100"]
    assert checkpoints_of([f"a={tmp_path / 'run'}", str(tmp_path / "run")])[0].startswith("a, step 3=")
    with pytest.raises(UserError, match="has no checkpoint-STEP"):
        checkpoints_of([str(tmp_path)])


def test_a_lora_at_scale_zero_is_its_base(lora_run, tmp_path, console):
    wanted = models.resolve([str(lora_run.folder)])
    columns = swept([models.base_of(wanted[0]), *wanted], SETTINGS, Sweep.parse("lora_scale=0,1,2"))
    files = draw(columns, [(PROMPTS[0], 3)], tmp_path, models.ModelLoader("float32", "cpu"), console)
    base, off, on, twice = (np.asarray(Image.open(paths[0])).astype(int) for paths in files.values())
    assert np.abs(base - off).max() <= 1
    assert 1 < np.abs(base - on).max()
    assert np.abs(on - twice).max() > 1


def test_a_scale_is_that_of_text_encoders_too(lora_run, tmp_path, console):
    """A LoRA that adapts text encoders as well: at 0 it is the base, whose own encoders are as they were afterwards."""
    file, stem = lora_run.folder / LORA_FILE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    (own,) = models.resolve([str(lora_run.folder)])
    width = models.load_base(own, torch.float32).text_encoders[0].config.hidden_size
    added = {f"{stem}.lora_A.weight": torch.randn(2, width), f"{stem}.lora_B.weight": torch.randn(width, 2)}
    said = {"base_model": own.base.source, "format": "pt"}
    save_file(load_file(file) | added, tmp_path / "both.safetensors", metadata=said)
    wanted = models.resolve([str(tmp_path / "both.safetensors"), f"unet={file}"])
    columns = swept([models.base_of(wanted[0]), *wanted], SETTINGS, Sweep.parse("lora_scale=0,1"))
    files = draw(columns, [(PROMPTS[0], 3)], tmp_path / "out", models.ModelLoader("float32", "cpu"), console)
    base, off, on, unet_off, unet_on = (np.asarray(Image.open(paths[0])).astype(int) for paths in files.values())
    assert np.abs(base - off).max() <= 1
    assert np.abs(base - unet_off).max() <= 1
    assert np.abs(on - unet_on).max() > 1  # the text encoder's part does something


def test_a_run_over_its_checkpoints_as_one_figure(diffalign, lora_run, tmp_path):
    words = ("--prompt", PROMPTS[0], "--seeds", "0-1", "--steps", "1", "--cell", "64", "--device", "cpu")
    code, said = diffalign("grid", lora_run.folder, "--checkpoints", "--show-base", *words, "--out", tmp_path / "g.pdf")
    assert code == 0, said
    assert "Drawing with step 3" in said
    assert "2 rows of 2 pictures" in said
    assert (tmp_path / "g.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture
def console():
    from rich.console import Console

    return Console(quiet=True)
