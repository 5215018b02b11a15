"""Whatever names a model on the command line becomes the pipeline it means."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffalign import backbones
from diffalign.errors import ModelError
from diffalign.jobs.devices import pick_device, pick_dtype
from diffalign.jobs.drawing import models
from tests.backbones.drawing import draw
from tests.jobs.material import as_it_was, write_run

LOADER = models.ModelLoader(device="cpu")  # shared, for speed: a test below shows that it keeps its base as it was


def load(spec, base=None):
    return LOADER.load(models.resolve([str(spec)], None if base is None else str(base))[0])


@pytest.fixture(scope="module")
def base_image(tiny_sdxl):
    return draw(backbones.load(tiny_sdxl).pipeline())


@pytest.fixture(scope="module")
def run_image(lora_run):
    pipeline = backbones.load(lora_run.base).pipeline()
    pipeline.load_lora_weights(str(lora_run.folder))
    return draw(pipeline)


def test_a_folder_is_the_model_itself(tiny_sdxl, base_image):
    loaded = models.load_pipeline(str(tiny_sdxl), device="cpu")
    assert loaded.name == "tiny-sdxl"
    assert torch.equal(draw(loaded.pipeline), base_image)


def test_a_run_and_its_parts_are_the_trained_model(lora_run, base_image, run_image):
    assert (run_image - base_image).abs().max() > 0.01
    for spec in (lora_run.folder, lora_run.folder / "pytorch_lora_weights.safetensors"):
        loaded = load(spec)
        assert loaded.name == "dpo"
        assert torch.equal(draw(loaded.pipeline), run_image)


def test_a_checkpoint_draws_as_the_run_did_then(lora_run, run_image):
    loaded = load(lora_run.checkpoint)
    assert loaded.name == "dpo/checkpoint-3"
    assert (draw(loaded.pipeline) - run_image).abs().max() < 1e-5


def test_a_checkpoint_of_before_draws_the_same(lora_run, run_image, tmp_path):
    old = as_it_was(shutil.copytree(lora_run.folder, tmp_path / "run") / "checkpoint-3")
    assert (draw(load(old).pipeline) - run_image).abs().max() < 1e-5


def test_a_run_of_all_weights(tiny_sdxl, base_image, tmp_path):
    run = write_run(tmp_path / "full", tiny_sdxl, tune="full")
    image = draw(load(run.folder).pipeline)
    assert (image - base_image).abs().max() > 0.01
    for spec in (run.folder / "unet", run.checkpoint):
        assert torch.equal(draw(load(spec).pipeline), image)


def test_a_lone_lora_names_its_base_or_needs_it_named(lora_run, run_image, tmp_path):
    named = shutil.copy(lora_run.folder / "pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    assert torch.equal(draw(load(named).pipeline), run_image)
    with safe_open(named, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    del header["base_model"]
    (tmp_path / "nameless").mkdir()
    save_file(tensors, tmp_path / "nameless" / "pytorch_lora_weights.safetensors", header)
    with pytest.raises(ModelError, match=r"does not say which model it belongs on.*--base"):
        load(tmp_path / "nameless")
    assert torch.equal(draw(load(tmp_path / "nameless", lora_run.base).pipeline), run_image)


def test_base_replaces_that_of_the_run_and_keeps_its_options(lora_run, tmp_path):
    moved = shutil.copytree(lora_run.base, tmp_path / "moved")
    (model,) = models.resolve([str(lora_run.folder)], str(moved))
    assert model.base.source == str(moved)
    config = lora_run.folder / "config.yaml"
    shutil.copytree(lora_run.folder, tmp_path / "run")
    text = config.read_text().replace("prediction_type: null", "prediction_type: v_prediction")
    (tmp_path / "run" / "config.yaml").write_text(text)
    (model,) = models.resolve([str(tmp_path / "run")], str(moved))
    assert model.base.prediction_type == "v_prediction"


def test_the_base_is_loaded_once_and_left_as_it_was(lora_run, base_image, run_image, tmp_path, monkeypatch):
    full = write_run(tmp_path / "full", lora_run.base, tune="full")
    loads = []
    original = models.loading.load
    monkeypatch.setattr(models.loading, "load", lambda *a, **k: loads.append(a) or original(*a, **k))
    loader = models.ModelLoader(device="cpu")
    wanted = models.resolve([str(lora_run.folder), str(full.folder), str(lora_run.checkpoint), str(lora_run.base)])
    images = [draw(loader.load(model).pipeline) for model in wanted]
    assert len(loads) == 1
    assert torch.equal(images[0], run_image)
    assert (images[1] - base_image).abs().max() > 0.01
    assert (images[2] - run_image).abs().max() < 1e-5
    assert torch.equal(images[3], base_image)


def test_identity_follows_the_weights(lora_run, tmp_path):
    identity = load(lora_run.folder).identity
    assert identity.startswith("dpo (float32, weights ")
    copied = shutil.copytree(lora_run.folder, tmp_path / "copy" / "dpo")
    assert load(copied).identity == identity
    assert load(lora_run.base).identity.split("weights")[1] != identity.split("weights")[1]
    other = write_run(tmp_path / "dpo", lora_run.base, seed=2)
    assert load(other.folder).identity != identity
    weaker = write_run(tmp_path / "half" / "dpo", lora_run.base, alpha=3.0)  # the same tensors at half the strength
    assert load(weaker.folder).identity != identity


def test_names_differ_between_columns(lora_run, tmp_path):
    other = shutil.copytree(lora_run.folder, tmp_path / "b" / "dpo")
    specs = [str(lora_run.folder), str(other), f"mine={other}"]
    assert [model.name for model in models.resolve(specs)] == [specs[0], specs[1], "mine"]
    with pytest.raises(ModelError, match="given twice"):
        models.resolve([str(other), str(other)])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.mkdir(), "holds no model: expected model_index.json"),
        (lambda folder: None, 'no model at.*Did you mean ".*good"'),
    ],
    ids=["empty", "missing"],
)
def test_what_is_no_model(prepare, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "good").mkdir(parents=True)
    prepare(tmp_path / "runs" / "goot")
    with pytest.raises(ModelError, match=message):
        load("runs/goot")


def test_an_unfinished_run_names_its_checkpoints(lora_run, tmp_path):
    shutil.copytree(lora_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("pytorch_lora*"))
    with pytest.raises(ModelError, match=r"has not finished.*checkpoint-3"):
        load(tmp_path / "run")


def test_a_run_whose_base_has_moved_says_so(lora_run, tmp_path):
    shutil.copytree(lora_run.folder, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(lora_run.base), "models/gone"))
    with pytest.raises(ModelError, match=r'was trained on "models/gone".*--base'):
        load(tmp_path / "run")


def test_another_programs_config_needs_a_base(lora_run, run_image, tmp_path):
    shutil.copytree(lora_run.folder, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint*"))
    (tmp_path / "lora" / "config.yaml").write_text("job: extension\n")
    with pytest.raises(ModelError, match="not the configuration of a training run"):
        load(tmp_path / "lora")
    assert torch.equal(draw(load(tmp_path / "lora", lora_run.base).pipeline), run_image)


def test_a_base_without_a_use_is_refused(tiny_sdxl, lora_run):
    with pytest.raises(ModelError, match="has no effect: tiny-sdxl is a whole model"):
        load(tiny_sdxl, lora_run.base)
    assert len(models.resolve([str(tiny_sdxl), str(lora_run.folder)], str(tiny_sdxl))) == 2


def test_devices_and_dtypes():
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ModelError, match=r'Unknown dtype "bfloat".*Did you mean "bfloat16"'):
        pick_dtype("bfloat", torch.device("cpu"))
    with pytest.raises(ModelError, match='Device "gpu" cannot be used'):
        pick_device("gpu")
