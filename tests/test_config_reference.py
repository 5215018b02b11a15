"""Every key has a meaning, and docs/configuration.md says what the classes say."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffalign.cli import app
from diffalign.config import reference
from diffalign.config.keys import keys, sections
from diffalign.errors import ConfigError

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf8").rstrip() == reference.page().rstrip(), f"run {reference.COMMAND}"


def test_the_command_prints_the_page():
    result = CliRunner().invoke(app, ["show", "keys"])
    assert result.output.rstrip() == reference.page().rstrip()


@pytest.mark.parametrize("key", keys(), ids=lambda key: f"{key.full} {key.objective or ''}".strip())
def test_every_key_is_explained(key):
    assert len(key.meaning.split()) >= 3
    assert key.meaning.endswith(".")
    assert re.match(r"text|true or false|(whole )?number|one of|list of", key.type)
    assert key.default or key.name in ("pretrained_model_name_or_path", "name")


def test_every_key_of_every_section_is_there():
    listed = [key.full for key in keys() if key.objective is None]
    expected = [f"{section}.{name}" for section, model in sections().items() for name in model.model_fields]
    assert sorted(listed) == sorted([*expected, "objective.name"])


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("train.train_batch_size", "whole number >= 1", "1"),
        ("train.seed", "whole number >= 0 and < 4294967296", "0"),
        ("optimizer.learning_rate", "number > 0", "1e-5"),
        ("train.gradient_checkpointing", "one of true, false, auto, selective", "auto"),
        ("lora.lora_alpha", "number > 0, or null", "null"),
        ("data.image_columns", "list of 2 texts, or null", "null"),
        ("lora.blocks", "list of down, mid, up (not empty)", "[down, mid, up]"),
        ("validation.validation_prompts", "text or list of texts, or null", "null"),
        ("model.prediction_type", "one of epsilon, v_prediction, or null", "null"),
        ("performance.sampling_buckets", "whole number >= 1 and <= 8", "4"),
        ("train.allow_tf32", "true or false", "false"),
    ],
)
def test_types_and_defaults_read_well(name, kind, default):
    (key,) = (key for key in keys() if key.full == name)
    assert (key.type, key.default) == (kind, default)


class TestShowKey:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["show", "key", *arguments])

    def test_of_a_section(self):
        output = self.run("train_batch_size").output
        assert output == self.run("train.train_batch_size").output
        assert output.splitlines()[0] == "train.train_batch_size"
        assert "Pairs in one micro-batch on one device." in output
        assert re.search(r"set to +\d+ by \S+/\S+, .* and \d+ more\n +\d+ by \S+/\S+", output)

    def test_of_objectives(self):
        output = reference.describe("objective.beta")
        assert "of d3po: number > 0, 0.1 by default" in output
        assert re.search(r"of .*\bnca\b.*: number > 0, 5000.0 by default", output)
        assert "sft" not in output

    def test_of_several_sections(self):
        shown = [line for line in self.run("guidance_scale").output.splitlines() if line[:1] not in ("", " ")]
        assert shown == ["rollout.guidance_scale", "validation.guidance_scale"]

    def test_of_a_whole_section(self):
        shown = [line for line in reference.describe("reference").splitlines() if line[:1] not in ("", " ")]
        assert shown == [f"reference.{name}" for name in sections()["reference"].model_fields]

    @pytest.mark.parametrize(("name", "meant"), [("lerning_rate", "learning_rate"), ("lr", "learning_rate")])
    def test_of_none(self, name, meant):
        with pytest.raises(ConfigError, match=f'Unknown key "{name}". Did you mean "optimizer.{meant}"'):
            reference.describe(name)

    def test_listed(self):
        output = CliRunner().invoke(app, ["list", "keys"], env={"COLUMNS": "300"}).output
        assert re.search(r"optimizer\.learning_rate +The rate after warm-up", output)
        assert re.search(r"objective\.label_smoothing +A hyperparameter of dpo, robust_dpo", output)
