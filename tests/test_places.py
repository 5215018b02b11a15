"""A path means one thing: where it is written decides where it starts, and the hub is never asked for a path."""

from pathlib import Path

import pytest

from diffalign import config as configuration
from diffalign import places
from diffalign.backbones import inspection, loading
from diffalign.data import open_pairs
from diffalign.errors import DataError, ModelError, UserError
from diffalign.jobs.scoring import scorers
from tests.config_files import write

ROOT = Path(__file__).parents[1]
OWN = """
base: tiny/dpo
model: {{pretrained_model_name_or_path: {model}}}
data: {{train_data_dir: {pairs}, scorer: "pickscore={scorer}"}}
validation: {{validation_steps: 10, validation_prompts: {prompts}}}
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Stand in an empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "files", "local"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", False, False),
        ("runs/demo", False, True),
        ("mine/dpo", False, True),  # there is a folder mine/
        ("./owner/name", False, True),
        ("~/models/sdxl", False, True),
        ("model", False, True),
        ("a/b/c", False, True),
        ("owner/name.safetensors", False, True),
        ("owner/name/model.safetensors", False, True),
        ("owner/name/model.safetensors", True, False),
        ("runs/name/model.safetensors", True, True),
    ],
)
def test_paths_and_hub_ids(elsewhere, text, files, local):
    (elsewhere / "mine").mkdir()
    assert places.looks_local(text, files=files) == local


class TestConfigurations:
    def test_paths_start_at_the_file(self, tmp_path, elsewhere):
        for name in ("model", "pairs", "scorer"):
            (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / "prompts.txt").write_text("a red circle\n")
        path = write(
            tmp_path / "own", OWN.format(model="model", pairs="pairs", scorer="./scorer", prompts="prompts.txt")
        )
        config = configuration.load(path)
        own = tmp_path / "own"
        assert config.model.pretrained_model_name_or_path == str(own / "model")
        assert config.data.train_data_dir == str(own / "pairs")
        assert config.data.scorer == f"pickscore={own / 'scorer'}"
        assert config.validation.validation_prompts == str(own / "prompts.txt")
        assert config.train.output_dir == "runs/tiny-dpo"  # written where one stands

    def test_what_is_no_path_stays(self, tmp_path, elsewhere):
        text = OWN.format(
            model="owner/name", pairs="pairs", scorer="owner/name/model.safetensors", prompts="a red circle"
        )
        config = configuration.load(write(tmp_path, text))
        assert config.model.pretrained_model_name_or_path == "owner/name"
        assert config.data.scorer == "pickscore=owner/name/model.safetensors"
        assert config.validation.validation_prompts == "a red circle"

    def test_overrides_start_where_one_stands(self, tmp_path, elsewhere):
        (elsewhere / "pairs").mkdir()
        (tmp_path / "pairs").mkdir()
        path = write(tmp_path, "base: tiny/dpo\ndata: {train_data_dir: pairs}\n")
        assert configuration.load(path).data.train_data_dir == str(tmp_path / "pairs")
        assert configuration.load(path, ["train_data_dir=pairs"]).data.train_data_dir == "pairs"

    def test_shipped_ones_read_what_ships(self, elsewhere):
        (elsewhere / "assets" / "tiny-sdxl").mkdir(parents=True)  # of the user's own
        config = configuration.load("tiny/spo")
        assert config.model.pretrained_model_name_or_path == str(ROOT / "assets" / "tiny-sdxl")
        assert config.rollout.scorer == f"step_aware={ROOT / 'assets' / 'tiny-step-aware'}"
        assert configuration.load("tiny/spo", ["prompts_file=mine.txt"]).data.prompts_file == "mine.txt"

    def test_what_is_written_down_says_the_same_anywhere(self, elsewhere, tmp_path, monkeypatch):
        config = configuration.load("tiny/spo", ["validation_prompts=a red circle"])
        portable = configuration.portable(config)
        written = write(tmp_path, configuration.dump(portable))
        assert "pretrained_model_name_or_path: assets/tiny-sdxl" in written.read_text()
        monkeypatch.chdir(tmp_path)
        again = configuration.load(written)
        assert configuration.portable(again) == portable
        assert again.train.output_dir == str(elsewhere / "runs" / "tiny-spo")
        assert again.validation.validation_prompts == "a red circle"

    @pytest.mark.parametrize("name", configuration.shipped_names())
    def test_every_shipped_one_can_be_a_base(self, name, tmp_path):
        above = configuration.load(write(tmp_path, f"base: {name}\ntrain: {{seed: 41}}\n"))
        assert above.train.seed == 41
        assert above.model_copy(update={"train": configuration.load(name).train}) == configuration.load(name)


class TestWhatIsMissing:
    """It is told at once: with the hub's retries, these took half a minute."""

    @pytest.fixture(autouse=True)
    def no_hub(self, elsewhere, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))

    def test_models(self):
        with pytest.raises(ModelError, match='There is no model at "runs/dpo"'):
            loading.load("runs/dpo")
        Path("models/sdxl").mkdir(parents=True)
        with pytest.raises(ModelError, match=r'There is no model at "models/sdlx".*Did you mean "models/sdxl"'):
            loading.load("models/sdlx")

    def test_pairs(self):
        with pytest.raises(DataError, match="There is no file or folder runs/pairs"):
            open_pairs("runs/pairs")

    def test_scorers(self):
        with pytest.raises(UserError, match=r'no file or folder "assets/pickscor" with weights of pickscore'):
            scorers.load("pickscore=assets/pickscor")


def test_what_ships_is_found_from_anywhere(elsewhere):
    assert len(open_pairs("assets/tiny-pairs", max_samples=3)) == 3
    assert scorers.load("pickscore=assets/tiny-pickscore")[0].name == "pickscore"
    assert inspection.read_index(inspection.located("assets/tiny-sdxl"))["_class_name"] == "StableDiffusionXLPipeline"
