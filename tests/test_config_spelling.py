"""Settings written as other trainers have them are answered with the right form; one value is a list of one."""

import pytest
from typer.testing import CliRunner

from diffalign import config as configuration
from diffalign.cli import app
from diffalign.config.keys import keys
from diffalign.config.spelling import unknown, with_equals
from diffalign.config.synonyms import SYNONYMS
from diffalign.errors import ConfigError
from tests.config_files import loader, message, write

FULL = {key.full for key in keys()}


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


class TestSynonyms:
    def test_every_target_is_a_key(self):
        assert {meant.key for meant in SYNONYMS.values()} <= FULL

    def test_none_is_what_it_means(self):
        assert not [name for name, meant in SYNONYMS.items() if meant.key.endswith(f".{name}")]

    def test_those_with_a_value_mean_one_that_is_taken(self, load):
        for name in ("fp16", "bf16", "use_8bit_adam", "use_lora", "full", "sft", "wandb", "min_snr"):
            meant = SYNONYMS[name]
            assert load(f"{meant.key}={meant.value}")

    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("lr=1e-5", "optimizer.learning_rate"),
            ("optimizer.lr=1e-5", "learning_rate"),
            ("train.lr=1e-5", "optimizer.learning_rate"),
            ("train.learning_rate=1e-5", "optimizer.learning_rate"),
            ("learning-rate=1e-5", "optimizer.learning_rate"),
            ("per_device_train_batch_size=4", "train.train_batch_size"),
            ("train.batch_size=4", "train_batch_size"),
            ("lora_rank=4", "lora.rank"),
            ("beta_dpo=2000", "objective.beta"),
            ("model=some/model", "model.pretrained_model_name_or_path"),
            ("output=runs/x", "train.output_dir"),
            ("dataset=some/data", "data.dataset_name"),
            ("steps=5", "train.max_train_steps"),
            ("fp16=true", "train.mixed_precision=fp16"),
            ("bf16=true", "train.mixed_precision=bf16"),
            ("resume=latest", "train.resume_from_checkpoint"),
            ("optimizer=adamw", "optimizer.name"),
        ],
    )
    def test_are_answered_with_the_key(self, load, override, meant):
        text = message(load, override)
        assert text.startswith(f'Unknown key "{override.partition("=")[0]}". Did you mean "{meant}"?')

    def test_in_a_file_too(self, tmp_path):
        with pytest.raises(ConfigError, match=r'Unknown key "optimizer\.lr"\. Did you mean "learning_rate"\?'):
            configuration.load(write(tmp_path, write(tmp_path).read_text() + "optimizer: {lr: 1.0e-5}\n"))

    def test_epochs_say_how_to_count_steps(self, load):
        assert "max_train_steps = epochs x examples / (train_batch_size x" in message(load, "num_train_epochs=3")

    def test_a_key_that_more_often_means_another_is_not_guessed(self, load):
        assert message(load, "batch_size=4") == (
            '"batch_size" could mean train.train_batch_size or inversion.batch_size: write one of them.'
        )
        assert load("inversion.batch_size=4").inversion.batch_size == 4

    def test_a_hyperparameter_of_the_objective_is_taken_at_its_word(self, load):
        assert "alpha" in SYNONYMS
        assert load("objective.name=dmpo", "alpha=0.1").build_objective().alpha == 0.1

    def test_hyperparameters_of_others_and_sections_are_named(self, load):
        assert message(load, "mu=0.5") == (
            'Unknown key "mu". It is a hyperparameter of sdpo; the objective here is "dpo".'
        )
        assert message(load, "train=5") == 'Unknown key "train". It is a section: write train.KEY=VALUE.'

    def test_what_is_near_nothing_gets_no_guess(self):
        assert unknown("zzz", FULL) == 'Unknown key "zzz".'


class TestWithEquals:
    @pytest.mark.parametrize(
        "words", [["rank: 4"], ["rank:", "4"], ["rank", "4"], ["rank", "=", "4"], ["rank=", "4"], ["rank", "=4"]]
    )
    def test_other_ways_of_writing_are_answered(self, load, words):
        assert message(load, "seed=3", *words) == (
            "Settings are written KEY=VALUE, without spaces and colons: seed=3 rank=4"
        )

    @pytest.mark.parametrize(
        "words", [["rank="], ["rank=", "seed=3"], ["train_data_dir=a: b"], ["pairs.yaml"], ["rank"], ["zzz", "4"]]
    )
    def test_what_is_not_one_of_them_is_left_alone(self, words):
        assert with_equals(words) is None


class TestDashes:
    @pytest.mark.parametrize(
        ("arguments", "right"),
        [
            ("--learning_rate 1e-5", "learning_rate=1e-5"),
            ("--learning-rate=1e-5", "learning_rate=1e-5"),
            ("-lr 1e-5", "learning_rate=1e-5"),
            ("--objective.beta 2000", "objective.beta=2000"),
            ("--beta_dpo 2000", "objective.beta=2000"),
            ("--batch_size 4", "train_batch_size=4"),
            ("--gradient_checkpointing --lora_rank 4", "gradient_checkpointing=true rank=4"),
            ("--gradient_checkpointing selective", "gradient_checkpointing=selective"),
            ("--timestep_low -5", "timestep_low=-5"),
            ("--seed", "seed=VALUE"),
            ("--fp16 --num_train_epochs 3", "mixed_precision=fp16 max_train_steps=STEPS"),
            ("--resume latest --lr 1e-5 seed=3", "--resume latest seed=3 learning_rate=1e-5"),
        ],
    )
    def test_are_answered_with_the_whole_command(self, arguments, right):
        result = CliRunner().invoke(app, ["train", "run.yaml", *arguments.split()])
        first, command, *_ = str(result.exception).splitlines()
        assert first == "Settings are written KEY=VALUE, without dashes:"
        assert command.endswith(f" train run.yaml {right}")

    def test_the_file_stays_in_front(self):
        result = CliRunner().invoke(app, ["train", "--lr", "1e-5", "run.yaml"])
        assert str(result.exception).endswith(" train run.yaml learning_rate=1e-5")

    @pytest.mark.parametrize(("command", "option"), [("precompute", ""), ("rollout", "--out x")])
    def test_of_every_command_with_settings(self, command, option):
        result = CliRunner().invoke(app, [command, "run.yaml", *option.split(), "--lr", "1e-5"])
        assert "learning_rate=1e-5" in str(result.exception)

    def test_of_several_sections(self):
        result = CliRunner().invoke(app, ["train", "run.yaml", "--scorer", "pickscore"])
        assert str(result.exception).startswith('"scorer" exists in several sections: write data.scorer=')

    @pytest.mark.parametrize("option", ["--resum", "--dry_run", "--zzz"])
    def test_what_is_no_setting_is_the_parsers(self, option):
        result = CliRunner().invoke(app, ["train", "run.yaml", option])
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)
        assert "No such option" in result.output


class TestLists:
    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("logging.report_to=wandb", ["wandb"]),
            ("logging.report_to=tensorboard,wandb", ["tensorboard", "wandb"]),
            ("logging.report_to=none", []),
            ("logging.report_to=null", []),
            ("logging.report_to=[]", []),
            ("lora.lora_target_modules=to_k", ["to_k"]),
            ("lora.lora_target_modules=to_k, to_q", ["to_k", "to_q"]),
            ("lora.blocks=mid", ["mid"]),
            ("data.image_columns=left,right", ["left", "right"]),
            ("data.score_range=0,1.5", [0.0, 1.5]),
            ("validation.seeds=3", [3]),
            ("validation.seeds=0,-1", [0, -1]),
            ("validation.validation_prompts=a red circle, and a dog", "a red circle, and a dog"),
            ("rollout.one_step_range=3,4", [3, 4]),
        ],
    )
    def test_one_value_or_several_in_a_text(self, load, override, value):
        section, _, key = override.partition("=")[0].partition(".")
        assert getattr(getattr(load(override), section), key) == value

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("image_columns=left", "\"data.image_columns\" must be: list of 2 texts, or null; got ['left'] (list)."),
            ("blocks=[]", '"lora.blocks" must be: list of down, mid, up (not empty); got [] (list).'),
            ("seeds=0,x", "\"validation.seeds.1\" must be an integer, got 'x' (str)."),
            ("seeds=true", '"validation.seeds" must be a list, got True (bool).'),
            ("report_to=tb", "\"logging.report_to.0\" must be 'tensorboard' or 'wandb', got 'tb' (str)."),
            ("lora_target_modules=5", '"lora.lora_target_modules.0" must be a word or text, got 5 (int).'),
            (
                "gradient_checkpointing=yes",
                "\"train.gradient_checkpointing\" must be: one of true, false, auto, selective; got 'yes' (str).",
            ),
        ],
    )
    def test_mistakes_are_told_as_before(self, load, override, expected):
        assert message(load, override) == expected
