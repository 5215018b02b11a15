"""What YAML means in a configuration file, and that a dumped configuration comes back."""

import pytest
import yaml

from diffalign import config as configuration
from diffalign.yaml_text import parse_yaml
from tests.config_files import write


@pytest.fixture
def load(tmp_path):
    """Return a function that loads the minimal configuration with overrides."""
    path = write(tmp_path)
    return lambda *overrides: configuration.load(path, list(overrides))


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-5", 1e-5),
            ("5e3", 5000.0),
            ("1.0e-08", 1e-8),
            ("+1_000.5", 1000.5),
            (".5", 0.5),
            ("-3.", -3.0),
            ("1_000", 1000),
            ("-7", -7),
            ("no", "no"),
            ("off", "off"),
            ("Yes", "Yes"),
            ("true", True),
            ("False", False),
            ("null", None),
            ("010", "010"),
            ("1:30", "1:30"),
            ("2024-01-01", "2024-01-01"),
            ("1e", "1e"),
            ("e5", "e5"),
            ("fp16", "fp16"),
        ],
    )
    def test_scalars(self, text, value):
        got = parse_yaml(text, "test")
        assert got == value
        assert type(got) is type(value)

    def test_mixed_precision_no_is_a_word(self, load):
        assert load("mixed_precision=no").train.mixed_precision == "no"


class TestDump:
    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            ["global_batch_size=64", "train_batch_size=4"],
            ["gradient_accumulation_steps=4"],
            ["objective.name=sft", "learning_rate=1e-9"],
            ["revision='1e5'", "tracker_name='no'", "variant='010'", "output_dir='2024-01-01'"],
            ["validation_steps=5", "validation_prompts=['yes', '1:30', 'a: b', 'null']", "seeds=[3, 4]"],
            ["lora_alpha=16", "timestep_high=900", "report_to=[]"],
        ],
    )
    def test_a_configuration_comes_back(self, load, tmp_path, overrides):
        config = load(*overrides)
        again = configuration.load(write(tmp_path, configuration.dump(config), "dumped.yaml"))
        assert again == config
        assert configuration.dump(again) == configuration.dump(config)

    def test_readers_of_yaml_1_1_understand_it_too(self, load):
        dumped = yaml.safe_load(configuration.dump(load("mixed_precision=no", "learning_rate=1e-9", "revision='1e5'")))
        assert dumped["train"]["mixed_precision"] == "no"
        assert dumped["optimizer"]["learning_rate"] == 1e-9
        assert dumped["model"]["revision"] == "1e5"
