import pytest

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.objectives.dpo import DPO
from diffalign.objectives.sft import SFT
from tests.config_files import MINIMAL, loader, message, write


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


def test_a_minimal_file_takes_defaults_for_the_rest(load):
    config = load()
    assert config.build_objective() == DPO(beta=2000.0)
    assert config.train.max_train_steps == 1000
    assert config.lora.lora_target_modules is None


class TestUnknownKeys:
    def test_of_the_objective(self, load):
        text = message(load, "objective.betta=3")
        assert text.startswith('Unknown key "objective.betta". Did you mean "beta"?')

    def test_of_a_section(self, load):
        assert message(load, "train.max_train_step=3") == (
            'Unknown key "train.max_train_step". Did you mean "max_train_steps"?'
        )

    def test_sections(self, load):
        assert message(load, "trian.seed=3") == 'Unknown key "trian". Did you mean "train"?'

    def test_in_the_file(self, tmp_path):
        path = write(tmp_path, MINIMAL + "optimiser:\n  learning_rate: 1e-5\n")
        with pytest.raises(ConfigError, match=r'Unknown key "optimiser"\. Did you mean "optimizer"\?'):
            configuration.load(path)

    def test_bare(self, load):
        assert message(load, "learning_rat=3") == (
            'Unknown key "learning_rat". Did you mean "optimizer.learning_rate"?'
        )
        assert message(load, "betta=3") == 'Unknown key "betta". Did you mean "objective.beta"?'

    def test_with_nothing_near(self, load):
        assert message(load, "train.zzz=3") == 'Unknown key "train.zzz".'

    def test_all_mistakes_are_told_at_once(self, load):
        text = message(load, "train.sed=3", "data.resolutoin=64", "lora.rank=ten")
        assert len(text.splitlines()) == 3


class TestWrongValues:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("max_train_steps=ten", "\"train.max_train_steps\" must be an integer, got 'ten' (str)."),
            ("max_train_steps=10.0", '"train.max_train_steps" must be an integer, got 10.0 (float).'),
            ("max_train_steps=10.5", '"train.max_train_steps" must be an integer, got 10.5 (float).'),
            ("max_train_steps=true", '"train.max_train_steps" must be an integer, got True (bool).'),
            ("learning_rate=ten", "\"optimizer.learning_rate\" must be a number, got 'ten' (str)."),
            ("learning_rate=true", '"optimizer.learning_rate" must be a number, got True (bool).'),
            ("learning_rate=1e999", '"optimizer.learning_rate" must be a finite number, got inf (float).'),
            ("random_flip=no", "\"data.random_flip\" must be true or false, got 'no' (str)."),
            ("random_flip=1", '"data.random_flip" must be true or false, got 1 (int).'),
            ("output_dir=5", '"train.output_dir" must be a word or text, got 5 (int).'),
            ("max_train_steps=0", '"train.max_train_steps" must be greater than or equal to 1, got 0 (int).'),
            ("adam_beta1=1.0", '"optimizer.adam_beta1" must be less than 1, got 1.0 (float).'),
            ("mixed_precision=fp8", "\"train.mixed_precision\" must be 'no', 'bf16' or 'fp16', got 'fp8' (str)."),
        ],
    )
    def test_name_the_key_the_expectation_and_the_value(self, load, override, expected):
        assert message(load, override) == expected

    @pytest.mark.parametrize("value", ["ten", "true", "-1", "[1]"])
    def test_of_hyperparameters(self, load, value):
        assert message(load, f"objective.beta={value}").startswith('"objective.beta" must be a finite number > 0, got ')

    def test_of_a_value_with_two_types(self, load):
        assert message(load, "validation_prompts=3") == (
            '"validation.validation_prompts" must be: text or list of texts, or null; got 3 (int).'
        )

    def test_of_a_section(self, tmp_path):
        with pytest.raises(ConfigError, match=r'"train" must be a block of keys, got 5 \(int\)'):
            configuration.load(write(tmp_path, MINIMAL + "train: 5\n"))
        with pytest.raises(ConfigError, match='"train" must hold keys, got 5'):
            configuration.load(write(tmp_path, MINIMAL + "train: 5\n"), ["seed=3"])

    def test_a_missing_key_is_named(self, tmp_path):
        text = MINIMAL.replace("  pretrained_model_name_or_path: some/model", "  tune: full")
        with pytest.raises(ConfigError, match=r'^Missing key "model\.pretrained_model_name_or_path"\.$'):
            configuration.load(write(tmp_path, text))


class TestObjective:
    def test_an_unknown_name_lists_what_there_is(self, load):
        assert message(load, "objective.name=dop").startswith(
            'Unknown objective "dop". Did you mean "dpo"? Available: '
        )

    @pytest.mark.parametrize("block", ["objective:", "objective:\n  beta: 5.0", "objective:\n  name: 5"])
    def test_a_missing_name_lists_what_there_is(self, tmp_path, block):
        text = MINIMAL[: MINIMAL.index("objective")] + block
        with pytest.raises(ConfigError, match=r'"objective\.name" must be one of alignprop, apo, '):
            configuration.load(write(tmp_path, text))

    def test_a_word_is_not_a_block(self, tmp_path):
        text = MINIMAL[: MINIMAL.index("objective")] + "objective: dpo\n"
        with pytest.raises(ConfigError, match=r"\"objective\" must be a block of keys, got 'dpo' \(str\)"):
            configuration.load(write(tmp_path, text))
        with pytest.raises(ConfigError, match="\"objective\" must hold keys, got 'dpo'"):
            configuration.load(write(tmp_path, text), ["objective.name=sft"])

    def test_another_name_on_the_command_line_clears_the_block(self, load):
        assert load("objective.name=sft").build_objective() == SFT()
        assert load("objective.name=dpo").build_objective() == DPO(beta=2000.0)

    def test_hyperparameters_on_the_command_line_go_to_the_named_objective_in_any_order(self, load):
        assert message(load, "objective.beta=5", "objective.name=sft").startswith('Unknown key "objective.beta".')
        assert load("beta=5", "objective.name=dpo").build_objective() == DPO(beta=5)


class TestOverrides:
    def test_with_a_section(self, load):
        config = load("objective.beta=500", "train.seed=7", "model.tune=full")
        assert (config.build_objective().beta, config.train.seed, config.model.tune) == (500, 7, "full")

    def test_without_a_section(self, load):
        config = load("learning_rate=1e-6", "max_train_steps=20", "rank=4", "report_to=[]")
        assert (config.optimizer.learning_rate, config.train.max_train_steps, config.lora.rank) == (1e-6, 20, 4)
        assert config.logging.report_to == []

    def test_bare_hyperparameters_belong_to_the_configured_objective(self, load):
        assert load("beta=500").build_objective() == DPO(beta=500)
        assert load("label_smoothing=0.1", "beta=500").build_objective() == DPO(beta=500, label_smoothing=0.1)
        assert message(load, "objective.name=sft", "beta=500").startswith('Unknown key "beta".')

    def test_an_ambiguous_bare_key_lists_its_sections(self, load):
        assert message(load, "name=sft") == (
            '"name" exists in several sections: write optimizer.name or objective.name.'
        )

    def test_null_clears(self, load):
        config = load("dataset_name=some/data", "train_data_dir=null")
        assert (config.data.dataset_name, config.data.train_data_dir) == ("some/data", None)

    def test_values_with_equals_signs(self, load):
        assert load("train_data_dir=/data/a=b").data.train_data_dir == "/data/a=b"

    def test_the_last_one_wins(self, load):
        assert load("seed=1", "seed=2").train.seed == 2

    def test_a_word_alone_is_refused(self, load):
        assert message(load, "objective.beta") == (
            'An override is written key=value, e.g. objective.beta=2000; got "objective.beta".'
        )

    def test_a_syntax_error_is_located(self, load):
        assert message(load, "seeds=[1, 2").startswith('The override "seeds=[1, 2" is not valid YAML: ')


class TestBase:
    def test_sections_are_laid_over_key_by_key(self, tmp_path):
        write(tmp_path, MINIMAL + "train:\n  seed: 3\n  output_dir: base\n", "base.yaml")
        config = configuration.load(write(tmp_path, "base: base.yaml\ntrain:\n  output_dir: own\n"))
        assert (config.train.seed, config.train.output_dir) == (3, "own")
        assert config.build_objective() == DPO(beta=2000.0)

    def test_a_commented_out_section_changes_nothing(self, tmp_path):
        write(tmp_path, MINIMAL + "train:\n  seed: 3\n", "base.yaml")
        assert configuration.load(write(tmp_path, "base: base.yaml\ntrain:\n  # seed: 4\n")).train.seed == 3

    def test_the_same_objective_keeps_its_other_hyperparameters(self, tmp_path):
        write(tmp_path, name="base.yaml")
        config = configuration.load(write(tmp_path, "base: base.yaml\nobjective:\n  label_smoothing: 0.1\n"))
        assert config.build_objective() == DPO(beta=2000.0, label_smoothing=0.1)

    def test_another_objective_replaces_the_block_whole(self, tmp_path):
        write(tmp_path, name="base.yaml")
        config = configuration.load(write(tmp_path, "base: base.yaml\nobjective:\n  name: sft\n"))
        assert config.objective == {"name": "sft"}

    def test_an_objective_that_is_no_block_is_refused(self, tmp_path):
        write(tmp_path, name="base.yaml")
        with pytest.raises(ConfigError, match='"objective" must be a block of keys'):
            configuration.load(write(tmp_path, "base: base.yaml\nobjective: sft\n"))

    def test_a_base_may_have_a_base(self, tmp_path):
        write(tmp_path, name="grandparent.yaml")
        write(tmp_path, "base: grandparent.yaml\nobjective: {beta: 7.0}\ntrain: {seed: 3}\n", "parent.yaml")
        config = configuration.load(write(tmp_path, "base: parent.yaml\nobjective: {beta: 8.0}\n"))
        assert (config.objective["beta"], config.train.seed) == (8.0, 3)

    def test_files_that_are_each_others_base(self, tmp_path):
        write(tmp_path, "base: b.yaml\n", "a.yaml")
        write(tmp_path, "base: ./a.yaml\n", "b.yaml")
        with pytest.raises(ConfigError, match=r"each other's base: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
            configuration.load(tmp_path / "a.yaml")

    def test_it_may_be_a_shipped_one(self, tmp_path):
        config = configuration.load(write(tmp_path, "base: sdxl/dpo-lora\ndata: {train_data_dir: pairs}\n"))
        assert config.optimizer.name == "adamw_8bit"

    def test_a_source_of_data_replaces_the_one_below(self, tmp_path):
        path = write(tmp_path, "base: sdxl/dpo\ndata: {train_data_dir: pairs}\n")
        assert configuration.load(path).data.dataset_name is None
        again = configuration.load(path, ["dataset_name=yuvalkirstain/pickapic_v2"])
        assert (again.data.dataset_name, again.data.train_data_dir) == ("yuvalkirstain/pickapic_v2", None)

    def test_it_is_looked_for_beside_the_file(self, tmp_path):
        (tmp_path / "below").mkdir()
        write(tmp_path, name="base.yaml")
        assert configuration.load(write(tmp_path / "below", "base: ../base.yaml\n")).train.seed == 0
        with pytest.raises(ConfigError, match=r'"base" in .*: There is no configuration "absent\.yaml"'):
            configuration.load(write(tmp_path, "base: absent.yaml\n"))

    @pytest.mark.parametrize("value", ["", "5", "[a.yaml]"])
    def test_it_is_one_file_name(self, tmp_path, value):
        with pytest.raises(ConfigError, match=r'"base" in .* must be a file beside it'):
            configuration.load(write(tmp_path, f"base: {value}\n" + MINIMAL))


class TestFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(ConfigError, match=r'There is no configuration ".*absent\.yaml"'):
            configuration.load(tmp_path / "absent.yaml")

    def test_folders(self, tmp_path):
        with pytest.raises(ConfigError, match=r"Cannot read the configuration .*: Is a directory"):
            configuration.load(tmp_path)

    def test_not_text(self, tmp_path):
        (tmp_path / "run.yaml").write_bytes(b"model: \xff")  # \xff\xfe would declare UTF-16, which is read
        with pytest.raises(ConfigError, match="Cannot read the configuration"):
            configuration.load(tmp_path / "run.yaml")

    def test_not_yaml(self, tmp_path):
        with pytest.raises(
            ConfigError,
            match=r"run\.yaml is not valid YAML: mapping values are not allowed here \(line 2, column 5\)\.$",
        ):
            configuration.load(write(tmp_path, "model: a\nb: c: d\n"))

    @pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n- b\n", "list"), ("dpo", "str")])
    def test_not_sections(self, tmp_path, text, kind):
        with pytest.raises(ConfigError, match=rf"must hold sections such as model: and objective:, got {kind}\."):
            configuration.load(write(tmp_path, text))

    def test_a_key_given_twice(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r'run\.yaml is not valid YAML: "model" is given twice \(line 9, column 1\)'
        ):
            configuration.load(write(tmp_path, MINIMAL + "model:\n  tune: full\n"))


class TestCombinations:
    def test_two_ways_to_accumulate(self, load):
        text = message(load, "global_batch_size=8", "gradient_accumulation_steps=2")
        assert text == (
            "Give train.global_batch_size or train.gradient_accumulation_steps, not both: one gives the other "
            "(train.global_batch_size: null switches it off)."
        )
        assert load("global_batch_size=null", "gradient_accumulation_steps=2").train.gradient_accumulation_steps == 2

    @pytest.mark.parametrize("overrides", [["dataset_name=some/data", "train_data_dir=pairs"], ["train_data_dir=null"]])
    def test_one_source_of_pairs(self, load, overrides):
        assert message(load, *overrides).startswith("Give exactly one of data.dataset_name (hub) and")

    def test_random_crops_are_not_cached(self, load):
        assert "data.random_crop needs data.cache_latents: false" in message(load, "random_crop=true")
        assert load("random_crop=true", "cache_latents=false").data.random_crop

    def test_timesteps_in_order(self, load):
        text = message(load, "timestep_low=500", "timestep_high=500")
        assert text == "denoising.timestep_low must be below denoising.timestep_high, got 500 and 500."
        assert load("timestep_low=500", "timestep_high=501").denoising.timestep_high == 501

    def test_validation_needs_prompts(self, load):
        assert "needs validation.validation_prompts" in message(load, "validation_steps=10")
        assert load("validation_steps=10", "validation_prompts=[a cat]").validation.validation_prompts == ["a cat"]
