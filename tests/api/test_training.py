"""`load_config` and `train`: several runs in one process, which stays as it was."""

import os
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign import objectives
from diffalign.errors import ConfigError, UserError
from diffalign.training.trainer import Trainer


def weights(run):
    return load_file(run.weights)


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def drawn_next() -> tuple[float, float, float]:
    """Return the next number of every global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(1))


@pytest.fixture
def seeded():
    """Seed the global generators, and return what they will draw next."""

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = drawn_next()
    seed()
    return expected


class TestLoadConfig:
    def test_a_shipped_name_and_its_file_are_the_same(self):
        named = diffalign.load_config("tiny/dpo")
        file = Path(diffalign.__file__).parents[1] / "configs" / "tiny" / "dpo.yaml"
        assert named == diffalign.load_config(file) == diffalign.load_config(str(file))

    def test_changes_in_every_form_are_the_same(self, tmp_path):
        expected = diffalign.load_config("tiny/dpo", "train.seed=7", "learning_rate=1e-6", f"output_dir={tmp_path}")
        by_key = {"train.seed": 7, "optimizer.learning_rate": 1e-6, "train.output_dir": tmp_path}
        nested = {"train": {"seed": 7, "output_dir": tmp_path}, "optimizer": {"learning_rate": 1e-6}}
        assert expected.train.seed == 7
        assert expected == diffalign.load_config("tiny/dpo", by_key) == diffalign.load_config("tiny/dpo", **nested)
        assert expected == diffalign.load_config("tiny/dpo", "seed=1", seed=7, learning_rate=1e-6, output_dir=tmp_path)

    def test_a_dictionary_and_a_config_are_changed_and_left_alone(self, content):
        first = diffalign.load_config(content)
        second = diffalign.load_config(first, seed=9, score_range=(0, 1))
        assert (first.train.seed, second.train.seed, second.data.score_range) == (0, 9, [0, 1])
        assert first == diffalign.load_config(content) == diffalign.load_config(second, seed=0, score_range=None)
        diffalign.load_config(content, seed=9)
        assert "seed" not in content["train"]

    def test_another_objective_takes_its_own_defaults(self, content):
        changed = diffalign.load_config(diffalign.load_config(content, beta=1.0), {"objective": {"name": "ipo"}})
        assert changed.build_objective() == objectives.load("ipo")

    def test_a_batch_said_in_one_way_may_be_said_in_another(self, content):
        config = diffalign.load_config(content, global_batch_size=16)
        assert diffalign.load_config(config, global_batch_size=None).train.gradient_accumulation_steps == 1

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("tiny/dpq",), "tiny/dpo"),
            (("tiny/dpo", {"betta": 1.0}), '"objective.beta"'),
            (("tiny/dpo", {"train": {"sed": 1}}), '"seed"'),
            (("tiny/dpo", {"train.seed": "one"}), "an integer"),
        ],
    )
    def test_mistakes_say_what_was_meant(self, arguments, named):
        with pytest.raises(ConfigError, match=named):
            diffalign.load_config(*arguments)


class TestRuns:
    def test_precisions_may_differ_between_runs_of_a_process(self, content, tmp_path, seeded, capsys):
        config, bf16 = diffalign.load_config(content), ("mixed_precision=bf16", "pure_bf16=false")  # with autocast
        first = diffalign.train(config, quiet=True)
        assert drawn_next() == seeded
        other = diffalign.train(content, *bf16, output_dir=tmp_path / "other", quiet=True)
        again = diffalign.train(config, {"train": {"output_dir": tmp_path / "again"}}, quiet=True)
        assert capsys.readouterr().out == ""
        assert same(weights(first), weights(again))
        assert not same(weights(first), weights(other))
        assert other.config.train.mixed_precision == "bf16"

    def test_a_run_says_what_it_left(self, content, capsys):
        run = diffalign.train(content)
        assert "Done: " in capsys.readouterr().out
        assert os.fspath(run) == content["train"]["output_dir"]
        assert run.history["step"].tolist() == [1, 2, 3, 4]
        assert run.history["loss"].iloc[-1] == run.metrics["loss"]
        assert f"| loss | {run.metrics['loss']:.4g} |" in run._repr_markdown_()

    def test_a_whole_network_is_found_too(self, content):
        run = diffalign.train(content, tune="full", max_train_steps=1, quiet=True)
        assert (run.weights / "diffusion_pytorch_model.safetensors").is_file()

    def test_an_interrupted_run_leaves_all_as_it_was_and_goes_on(self, content, tmp_path, monkeypatch, seeded):
        def interrupt(trainer, step, *what):
            if step == 3:
                raise KeyboardInterrupt
            return steps(trainer, step, *what)

        steps = Trainer._optimizer_step
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_optimizer_step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                diffalign.train(content)
        assert drawn_next() == seeded
        resumed = diffalign.train(content, resume="latest")
        whole = diffalign.train(content, output_dir=tmp_path / "whole", mixed_precision="no", quiet=True)
        assert resumed.history["step"].tolist() == [1, 2, 3, 4]
        assert same(weights(resumed), weights(whole))

    def test_networks_are_freed(self, content, monkeypatch):
        policies, fit = [], Trainer.fit

        def watched(trainer):
            policies.append(weakref.ref(trainer.policy))
            return fit(trainer)

        monkeypatch.setattr(Trainer, "fit", watched)
        diffalign.train(content, max_train_steps=1, quiet=True)
        assert [policy() for policy in policies] == [None]

    def test_mistakes_reach_the_caller(self, content):
        with pytest.raises(UserError, match="no/such/pairs"):
            diffalign.train(content, train_data_dir="no/such/pairs", quiet=True)
