"""The commands that draw and score, on transformers: runs of LoRAs and of all weights, and what is refused."""

import numpy as np
import pytest
import torch

from diffalign.backbones import loading
from diffalign.backbones.adapters import has_adapters
from diffalign.errors import ModelError, UserError
from diffalign.evaluation import Manifest, SamplingSettings, generate
from diffalign.evaluation.negative_branch import with_negative_branch
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.negative import Negative
from diffalign.jobs.scoring.implicit import ImplicitReward
from tests.jobs.material import PROMPTS, write_run

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, batch_size=2, height=64, width=64)
SIDES = "--height", 64, "--width", 64


MODELS = ["tiny_sd3", "tiny_klein", "tiny_lumina2", "tiny_pixart_alpha", "tiny_qwen", "tiny_sana", "tiny_zimage"]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """Return the folder of a model with a transformer."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Return a run of a LoRA and one of all weights."""
    folder = tmp_path_factory.mktemp("runs")
    return {tune: write_run(folder / tune, model, tune) for tune in ("lora", "full")}


def pictures(pipeline):
    return [image.tobytes() for image in generate(pipeline, PROMPTS, [0, 1], SETTINGS, progress=False)]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_and_its_checkpoint_are_the_same_model_and_not_the_base(runs, tune):
    loader = models.ModelLoader("float32", "cpu")
    run = runs[tune]
    drawn, identities = {}, {}
    for place in (run.folder, run.checkpoint, run.base):
        loaded = loader.load(models.resolve([str(place)])[0])
        drawn[place], identities[place] = pictures(loaded.pipeline), loaded.identity.partition("weights")[2]
    assert drawn[run.folder] == drawn[run.checkpoint] != drawn[run.base]
    assert len(set(identities.values())) == 2
    assert not has_adapters(loader.load(models.resolve([str(run.base)])[0]).pipeline.transformer)


def test_generate_and_grid_from_the_command_line(runs, diffalign, tmp_path):
    out = tmp_path / "pictures"
    code, said = diffalign("generate", runs["lora"].folder, "--prompt", PROMPTS[0], "--steps", 2, "--out", out, *SIDES)
    assert code == 0, said
    manifest = Manifest.read(out)
    assert len(manifest.paths) == 1
    arguments = [
        "--show-base",
        "--prompt",
        PROMPTS[0],
        "--seeds",
        0,
        "--steps",
        2,
        "--out",
        tmp_path / "grid.png",
        *SIDES,
    ]
    code, said = diffalign("grid", runs["lora"].folder, *arguments, "--sweep", "lora_scale=0,1")
    assert code == 0, said
    assert "1 rows of 3 pictures" in said


def test_a_lora_of_a_unet_is_refused_before_the_model_is_read(runs, lora_run, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr(loading, "load", load)
    loader = models.ModelLoader("float32", "cpu")
    wrong = {str(lora_run.folder): runs["lora"].base, str(runs["lora"].folder): lora_run.base}
    for weights, base in wrong.items():
        with pytest.raises(ModelError, match=r"adapts a .* Give a LoRA of its family"):
            loader.load(models.resolve([weights], str(base))[0])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_implicit_reward_is_that_of_the_run(runs, tune):
    scorer = ImplicitReward(str(runs[tune].folder), "cpu", num_draws=2)
    image = generate(loading.load(runs[tune].base).pipeline(), PROMPTS[:1], [3], SETTINGS, progress=False)[0]
    assert scorer.score([image], PROMPTS[:1]).abs().item() > 1e-3
    with torch.no_grad():
        for (name, policy), reference in zip(
            scorer.policy.named_parameters(), scorer.reference.parameters(), strict=True
        ):
            policy.copy_(torch.zeros_like(policy) if "lora_B" in name else reference)
    assert scorer.score([image], PROMPTS[:1]).item() == 0.0


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_negative_branch_guides_away_from_another_network(runs, model, tune):
    base = loading.load(model).pipeline()
    plain = pictures(base)
    guided = with_negative_branch(base, runs[tune].folder)
    assert pictures(guided) != plain
    assert pictures(base) == plain
    nothing = with_negative_branch(base, runs[tune].folder, negative_scale=0.0)
    drawn, wanted = (np.frombuffer(b"".join(drawn), np.uint8).astype(int) for drawn in (pictures(nothing), plain))
    assert abs(drawn - wanted).max() <= 1  # a batch in halves rounds otherwise


def test_a_negative_branch_needs_guidance(runs):
    with pytest.raises(UserError, match="needs guidance"):
        Negative(str(runs["lora"].folder)).check(1.0, models.resolve([str(runs["lora"].base)]))
