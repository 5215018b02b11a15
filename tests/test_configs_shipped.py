"""Every configuration that is shipped loads, and says what it would do without weights, data or a network."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console

from diffalign import config as configuration
from diffalign import objectives
from diffalign.backbones.files import read_header
from diffalign.config.changes import changed, dump_changed
from diffalign.errors import ModelError
from diffalign.jobs.training import memory, meta_model, plan, preflight
from diffalign.objectives.base import UNITS
from diffalign.shapes.pipeline import build_unet
from diffalign.shapes.sd3 import build_transformer

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate")
NAMES = [str(path.relative_to(CONFIGS)) for path in SHIPPED]
PUBLISHED = {"sdxl": 2_567_463_684, "sd15": 859_520_964, "flux": 11_901_408_320, "zimage": 6_154_908_736}
PUBLISHED |= {"pixart": 610_856_096, "qwen": 20_430_401_088, "sana": 1_604_462_752, "lumina2": 2_609_769_152}
SEVERAL = {  # of SD3-medium and of SD3.5-medium; of FLUX.2-klein-base-4B and -dev
    "sd3": (2_028_328_000, 2_243_171_520),
    "flux2": (3_875_544_576, 32_223_281_152),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder whose assets/ say of which shape the embedded models are, and hold no weights.

    With it the numbers of parameters by the folder of their recipes.
    """
    root = tmp_path_factory.mktemp("root")
    sizes = {}
    for recipes, name, part, denoiser, pipeline in (
        ("tiny", "tiny-sdxl", "unet", build_unet(), "StableDiffusionXLPipeline"),
        ("tiny-sd3", "tiny-sd3", "transformer", build_transformer(), "StableDiffusion3Pipeline"),
    ):
        denoiser.save_config(root / "assets" / name / part)
        index = {"_class_name": pipeline, part: ["diffusers", type(denoiser).__name__]}
        (root / "assets" / name / "model_index.json").write_text(json.dumps(index))
        sizes[recipes] = sum(parameter.numel() for parameter in denoiser.parameters())
    scheduler = root / "assets" / "tiny-sd3" / "scheduler"
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(scheduler)
    return root, sizes


def shown(config: configuration.Config) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    plan.show(config, preflight.examine(config), console)
    return console.export_text()


def test_there_are_recipes_of_every_size():
    assert {path.parent.name for path in SHIPPED} >= {"tiny", "tiny-sd3", *SEVERAL, *PUBLISHED}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_says_what_it_would_do(name, world, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    folder, embedded = world
    monkeypatch.chdir(folder)
    monkeypatch.setattr(preflight, "world_size", lambda: 1)
    config = configuration.load(CONFIGS / name)
    objective = config.build_objective()
    assert type(objective) is objectives.objective_class(config.objective["name"])

    text = shown(config)
    recipes = Path(name).parent.name
    family = {"tiny": "sdxl", "tiny-sd3": "sd3", "pixart": "pixart-sigma"}.get(recipes, recipes)
    total = int(re.search(rf"model\s+{family}, ([\d,]+) parameters", text)[1].replace(",", ""))
    assert total in (SEVERAL[recipes] if recipes in SEVERAL else ((PUBLISHED | embedded)[recipes],))
    assert ("from its config" in text) == (recipes in embedded)
    assert repr(objective) in text
    trained = int(re.search(r"trained\s+([\d,]+) parameters", text)[1].replace(",", ""))
    assert (trained == total) == (config.model.tune == "full")
    assert 0 < trained <= total
    wanted = config.train.global_batch_size or config.train.train_batch_size * config.train.gradient_accumulation_steps
    unit = UNITS[objective.layout]
    assert f"= {wanted} {unit} per optimizer step" in text


@pytest.mark.parametrize("name", NAMES)
def test_its_resolved_form_loads_again(name, tmp_path):
    config = configuration.load(CONFIGS / name)
    (tmp_path / "config.yaml").write_text(configuration.dump(configuration.portable(config)), encoding="utf8")
    again = configuration.load(tmp_path / "config.yaml")
    assert configuration.portable(again) == configuration.portable(config)


@pytest.mark.parametrize("name", NAMES)
def test_its_changed_keys_are_the_whole_of_it(name, tmp_path):
    config = configuration.load(CONFIGS / name)
    (tmp_path / "config.yaml").write_text(dump_changed(configuration.portable(config)), encoding="utf8")
    again = configuration.load(tmp_path / "config.yaml")
    assert configuration.portable(again) == configuration.portable(config)
    sections = changed(config)
    defaults = configuration.check({**sections, "lora": {}}).lora.model_dump(mode="json")
    assert not [key for key, value in sections.get("lora", {}).items() if value == defaults[key]]


def test_runs_write_into_folders_of_their_own():
    folders = [configuration.load(path).train.output_dir for path in SHIPPED]
    assert len(set(folders)) == len(folders)


def test_the_learning_rates_of_the_papers_are_reached():
    rates = {}
    for name in ("sdxl/dpo.yaml", "sd15/dpo.yaml"):
        config = configuration.load(CONFIGS / name)
        rates[name] = config.optimizer.learning_rate * config.train.global_batch_size
        assert config.optimizer.scale_lr
    assert rates == pytest.approx({"sdxl/dpo.yaml": 2.048e-5, "sd15/dpo.yaml": 2.048e-5})


def test_the_plan_counts_the_adapters_of_the_chosen_blocks_only(world, monkeypatch):
    monkeypatch.chdir(world[0])
    counts = []
    for blocks in ("[down,mid,up]", "[mid,up]"):
        text = shown(configuration.load(CONFIGS / "tiny" / "dpo.yaml", [f"lora.blocks={blocks}"]))
        counts.append(int(re.search(r"trained\s+([\d,]+) parameters", text)[1].replace(",", "")))
    assert 0 < counts[1] < counts[0]


def test_a_tiny_run_needs_little_memory(world, monkeypatch):
    monkeypatch.chdir(world[0])
    text = shown(configuration.load(CONFIGS / "tiny" / "dpo.yaml"))
    assert float(re.search(r"about ([\d.]+) GiB", text)[1]) < 0.1


def test_memory_is_added_up_as_stated(monkeypatch):
    monkeypatch.setattr(preflight, "world_size", lambda: 1)
    config = configuration.load(CONFIGS / "sdxl" / "dpo.yaml", ["optimizer.name=adamw"])
    batch = plan.BatchPlan.of(config.train, 1)
    model = meta_model.read(config)
    counts = memory.Counts(model.family, model.denoiser, PUBLISHED["sdxl"], PUBLISHED["sdxl"])
    estimated = memory.estimate(config, batch, counts, "full")
    gigabytes = PUBLISHED["sdxl"] / 2**30
    assert estimated.weights == pytest.approx(4 * gigabytes)  # float32 weights that train
    assert estimated.reference == pytest.approx(2 * gigabytes)  # a bfloat16 copy
    assert estimated.gradients == pytest.approx(4 * gigabytes)
    assert estimated.optimizer == pytest.approx(8 * gigabytes)
    assert estimated.activations == pytest.approx(2 * 0.5)  # two images of 1024 x 1024, checkpointed


def test_the_text_of_flux_stays_when_pictures_get_smaller(monkeypatch):
    monkeypatch.setattr(preflight, "world_size", lambda: 1)

    def activations(*changes):
        config = configuration.load(CONFIGS / "flux" / "dpo-lora.yaml", ["train_batch_size=1", *changes])
        model = meta_model.read(config)
        total, trained = meta_model.count(config, model.denoiser)
        counts = memory.Counts(model.family, model.denoiser, total, trained)
        return memory.estimate(config, plan.BatchPlan.of(config.train, 1), counts, "none").activations

    assert activations("data.resolution=1024") == pytest.approx(2 * 27.1)
    assert activations() == pytest.approx(2 * 27.1 * (32**2 + 512) / (64**2 + 512))


@pytest.mark.parametrize(("available", "kind"), [(24, "none"), (16, "selective"), (10, "full"), (4, "full")])
def test_as_little_is_recomputed_as_the_memory_asks_for(available, kind):
    config = configuration.load(CONFIGS / "sdxl" / "dpo-lora.yaml", ["train_batch_size=1"])
    model = meta_model.read(config)
    counts = memory.Counts(model.family, model.denoiser, PUBLISHED["sdxl"], 92_900_000)
    decided = memory.checkpointing(config, plan.BatchPlan.of(config.train, 1), counts, available)
    assert decided.kind == kind
    assert ("lower train.train_batch_size" in decided.why) == (available == 4)


def test_a_single_file_is_recognised_by_its_tensors(tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    names = ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"]
    save_file({name: zeros(1) for name in names}, tmp_path / "merge.safetensors")
    assert read_header(tmp_path / "merge.safetensors").keys() >= set(names)
    overrides = [f"pretrained_model_name_or_path={tmp_path / 'merge.safetensors'}"]
    model = meta_model.read(configuration.load(CONFIGS / "sd15" / "dpo.yaml", overrides))
    assert (model.family, model.origin) == ("sdxl", "counted as the published sdxl")
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == PUBLISHED["sdxl"]


def test_models_that_cannot_be_trained_are_refused_by_the_plan_too(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    config = configuration.load(CONFIGS / "sdxl" / "dpo.yaml", [f"pretrained_model_name_or_path={tmp_path}"])
    with pytest.raises(ModelError, match="AuraFlowPipeline"):
        meta_model.read(config)
    config = configuration.load(CONFIGS / "sdxl" / "dpo.yaml", ["pretrained_model_name_or_path=absent"])
    with pytest.raises(ModelError, match='There is no model at "absent"'):
        meta_model.read(config)
