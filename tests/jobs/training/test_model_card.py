"""Model cards say what was changed, and nothing about the folders of the machine they were made on."""

from pathlib import Path

import pytest
import yaml

from diffalign import config as configuration
from diffalign.jobs.training import model_card

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate")
CONTENT = {
    "model": {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"},
    "data": {"dataset_name": "yuvalkirstain/pickapic_v2", "cache_dir": "/home/me/cache", "resolution": 1024},
    "objective": {"name": "dpo", "beta": 2000.0},
    "train": {"output_dir": "/home/me/runs/sdxl-dpo", "max_train_steps": 400},
}


def render(content, **options):
    config = configuration.check(content)
    text = model_card.render(config, "sdxl", {"loss": 0.65}, **options)
    _, header, body = text.split("---\n", 2)
    block = body.split("```yaml\n")[1].split("```")[0]
    return yaml.safe_load(header), body, block


def test_only_what_was_changed_and_it_makes_the_same_run(tmp_path):
    header, body, block = render(CONTENT)
    assert header["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert header["library_name"] == "diffusers"
    assert header["datasets"] == ["yuvalkirstain/pickapic_v2"]
    assert header["tags"] == ["text-to-image", "diffusers", "lora", "dpo", "diffalign"]
    assert "license" not in header
    assert yaml.safe_load(block) == {
        "model": {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"},
        "data": {"dataset_name": "yuvalkirstain/pickapic_v2", "resolution": 1024},
        "objective": {"name": "dpo", "beta": 2000.0},
        "train": {"max_train_steps": 400},
    }
    assert "/home/me" not in body
    assert "# sdxl-dpo" in body
    assert "diffalign train run.yaml" in body
    file = tmp_path / "run.yaml"
    file.write_text(block)
    again = configuration.load(file, ["train.output_dir=/home/me/runs/sdxl-dpo", "cache_dir=/home/me/cache"])
    assert again == configuration.check(CONTENT)


@pytest.mark.parametrize("relative", [True, False])
def test_local_models_and_data_are_given_by_their_names(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/base", "models/sft", "data/pairs"):
        (tmp_path / folder).mkdir(parents=True)
    root = "" if relative else f"{tmp_path}/"
    content = {
        "model": {"pretrained_model_name_or_path": f"{root}models/base", "unet_init": f"{root}models/sft"},
        "data": {
            "train_data_dir": f"{root}data/pairs",
            "preference_from": "scores",
            "scorer": f"pickscore={root}models/base",
            "caption_column": "text",
        },
        "objective": {"name": "dpo"},
    }
    header, body, block = render(content)
    assert "base_model" not in header
    assert str(tmp_path) not in body
    settings = yaml.safe_load(block)
    assert settings["model"] == {"pretrained_model_name_or_path": "base", "unet_init": "sft"}
    assert settings["data"]["train_data_dir"] == "pairs"
    assert settings["data"]["scorer"] == "pickscore=base"
    assert "A LoRA for `base`, aligned with the preference pairs of pairs" in body


PLACES = ["{}/my data/pairs, new", "{}/a=b/pairs", "~/data/pairs", "../pairs", "C:\\Users\\me\\pairs", "{}/a,b/c/pairs"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("there", [True, False])
def test_no_folder_of_a_path_is_told_however_it_is_written(tmp_path, monkeypatch, place, there):
    monkeypatch.chdir(tmp_path)
    place = place.format(tmp_path / "home")
    if there and "home" in place:
        Path(place).mkdir(parents=True)
    content = CONTENT | {
        "model": {"pretrained_model_name_or_path": place},
        "data": {"dataset_name": place, "scorer": f"pickscore={place}", "label_source": "reward"},
    }
    header, body, block = render(content)
    assert "base_model" not in header
    assert "datasets" not in header
    for text in (body, block):
        assert not any(word in text for word in ("home", "Users", "my data", "a=b", "a,b", "~", str(tmp_path)))
    assert "pairs" in yaml.safe_load(block)["data"]["dataset_name"]


def test_on_the_hub_it_says_how_to_load_it_from_there():
    _, body, _ = render(CONTENT, repo="me/sdxl", processes=8)
    assert "# sdxl\n" in body
    assert 'pipe.load_lora_weights("me/sdxl")' in body
    assert "accelerate launch --num_processes 8 -m diffalign train run.yaml" in body


def test_the_last_grid_is_shown(tmp_path):
    for step in (20, 400):
        (tmp_path / "validation").mkdir(exist_ok=True)
        (tmp_path / "validation" / f"step-{step:06d}.png").write_bytes(b"")
    content = {**CONTENT, "train": {"output_dir": str(tmp_path)}}
    assert "](validation/step-000400.png)" in render(content)[1]
    assert "validation/" not in render(CONTENT)[1]


def test_every_shipped_configuration_is_made_again_from_what_it_changes():
    for file in SHIPPED:
        config = configuration.load(file)
        assert configuration.check(configuration.changed(config)) == config, file
