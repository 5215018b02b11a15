"""`diffalign export`: whatever is asked for loads in diffusers and draws what the run drew."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from diffalign import backbones
from diffalign.backbones import adapters, export
from diffalign.backbones.files import LORA_FILE, read_header
from diffalign.jobs.training.export import FORMATS
from diffalign.training import checkpoint
from tests.backbones.drawing import draw
from tests.jobs.material import as_it_was, write_run


@pytest.fixture(scope="module")
def lora_run(tiny_sdxl, tmp_path_factory):
    """Return a run whose LoRA is weak: a strong one makes this UNet of random weights multiply rounding errors."""
    return write_run(tmp_path_factory.mktemp("runs") / "dpo", tiny_sdxl, alpha=0.5)


@pytest.fixture(scope="module")
def full_run(tiny_sdxl, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "full", tiny_sdxl, tune="full")


def drawn(base, form, written):
    """Return what stock diffusers draws with an export."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if form == "unet":
        pipeline.unet = UNet2DConditionModel.from_pretrained(written)
    else:
        pipeline.load_lora_weights(written)
    return draw(pipeline)


@pytest.fixture(scope="module")
def images(lora_run, full_run):
    """Return what the base and the two runs draw."""
    lora = DiffusionPipeline.from_pretrained(lora_run.base)
    base = draw(lora)
    lora.load_lora_weights(lora_run.folder)
    tuned = DiffusionPipeline.from_pretrained(full_run.base, unet=UNet2DConditionModel.from_pretrained(
        full_run.folder / "unet"))  # fmt: skip
    return {"base": base, "lora": draw(lora), "full": draw(tuned)}


@pytest.mark.parametrize("place", ["", "checkpoint-3", "old checkpoint"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_lora_in_every_format(diffalign, lora_run, images, tmp_path, form, place):
    run = shutil.copytree(lora_run.folder, tmp_path / "dpo")
    if place == "old checkpoint":
        as_it_was(run / "checkpoint-3")
    code, said = diffalign("export", run / ("checkpoint-3" if place else ""), "--format", form)
    assert code == 0, said
    folder = run / "export" / ("checkpoint-3" if place else "final")
    names = {"diffusers": LORA_FILE, "unet": "unet"}
    written = folder / names.get(form, f"dpo{'-3' if place else ''}.safetensors")
    assert str(written) in said
    image = drawn(lora_run.base, form, folder if form == "diffusers" else written)
    torch.testing.assert_close(image, images["lora"], rtol=0, atol=1e-5)
    assert (image - images["base"]).abs().max() > 0.01
    if form != "unet":
        file = folder / LORA_FILE if form == "diffusers" else written
        assert read_header(file)["__metadata__"]["training_steps"] == ("3" if place else "1000")


@pytest.mark.parametrize("place", ["", "checkpoint-3"])
@pytest.mark.parametrize("form", ["diffusers", "unet"])
def test_all_weights(diffalign, full_run, images, tmp_path, form, place):
    code, said = diffalign("export", full_run.folder / place, "--format", form, "--out", tmp_path)
    assert code == 0, said
    assert "UNet2DConditionModel.from_pretrained" in said
    assert torch.equal(drawn(full_run.base, "unet", tmp_path / "unet"), images["full"])


def test_dtypes_and_places(diffalign, lora_run, tmp_path):
    for dtype in ("float16", "bfloat16"):
        file = tmp_path / f"{dtype}.safetensors"
        code, said = diffalign("export", lora_run.checkpoint, "--format", "kohya", "--dtype", dtype, "--out", file)
        assert code == 0, said
        assert {t.dtype for name, t in load_file(file).items() if "alpha" not in name} == {getattr(torch, dtype)}


def test_a_run_with_a_moving_average_exports_that(diffalign, lora_run, tmp_path):
    run = shutil.copytree(lora_run.folder, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("use_ema: false", "use_ema: true"))
    denoiser = backbones.load(lora_run.base).denoiser
    adapters.add_lora(denoiser, 2, 6.0)
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    averages = [torch.full_like(p, 0.01 * number) for number, p in enumerate(trained.values())]
    form = checkpoint.WeightsFile(LORA_FILE, export.lora_keys(denoiser), export.lora_header(denoiser))
    checkpoint.save(run, 5, trained, {"ema": {"shadow_params": averages}}, {}, None, form)
    code, said = diffalign("export", run / "checkpoint-5", "--out", tmp_path)
    assert code == 0, said
    written = load_file(tmp_path / LORA_FILE)
    assert written.keys() == set(form.keys.values())
    for name, average in zip(trained, averages, strict=True):
        assert torch.equal(written[form.keys[name]], average)


def test_a_base_that_has_moved(diffalign, lora_run, images, tmp_path):
    run = shutil.copytree(lora_run.folder, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(lora_run.base), "models/gone"))
    for form, message in {
        "unet": 'was trained on "models/gone"',
        "diffusers": "not read; counted as the published",
    }.items():
        code, said = diffalign("export", run, "--format", form, "--out", tmp_path)
        assert code == 2
        assert message in said
        assert "--base" in said
    code, said = diffalign("export", run, "--format", "unet", "--out", tmp_path, "--base", lora_run.base)
    assert code == 0, said
    torch.testing.assert_close(drawn(lora_run.base, "unet", tmp_path / "unet"), images["lora"], rtol=0, atol=1e-5)


def test_what_cannot_be_is_refused(diffalign, lora_run, full_run, tmp_path):
    unfinished = shutil.copytree(lora_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("pytorch_lora*"))
    shutil.copytree(lora_run.checkpoint, unfinished / "checkpoint-3", dirs_exist_ok=True)
    wrong = {
        (full_run.folder, "kohya"): "tuned all weights, and kohya's layout is for LoRAs. Use --format unet",
        (lora_run.folder, "koyha"): 'Did you mean "kohya"',
        (unfinished, "kohya"): r"has not finished. Name one of its checkpoints (checkpoint-3)",
        (tmp_path / "nothing", "kohya"): "is no training run and no checkpoint of one",
        (lora_run.folder / "checkpoint-9", "kohya"): "is no training run and no checkpoint of one",
    }
    for (place, form), message in wrong.items():
        code, said = diffalign("export", place, "--format", form, "--out", tmp_path / "out")
        assert code == 2, said
        assert message in said
    code, said = diffalign("export", lora_run.folder, "--dtype", "float8", "--out", tmp_path / "out")
    assert code == 2
    assert 'Unknown dtype "float8"' in said
    assert not (tmp_path / "out").exists()
    other = shutil.copytree(lora_run.folder, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    config = config.replace("lora_target_modules: null", "lora_target_modules: [to_k, to_v]")
    (other / "config.yaml").write_text(config)
    code, said = diffalign("export", other, "--out", tmp_path / "out")
    assert code == 2
    assert "holds other weights" in said
    state = json.loads((lora_run.checkpoint / "state.json").read_text())
    assert state["step"] == 3
