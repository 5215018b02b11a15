"""Objectives that sample while they train: equal runs whatever the batching, resuming, ranks, and what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.training.train import build_trainer, make_accelerator
from tests.e2e.test_methods import ASSETS, ROLLOUT
from tests.e2e.test_training import assert_close, assert_same_bits, variant, weights

ROOT = Path(__file__).parents[2]
PROMPTS = str(ASSETS / "prompts" / "tiny-train.txt")


@pytest.fixture
def online(content):
    """Return a function that makes the configuration of two steps of an online objective."""

    def make(name, **sections):
        changed = copy.deepcopy(content)
        changed["objective"] = {"name": name}
        changed["data"] = {"prompts_file": PROMPTS, "resolution": 64}
        changed["rollout"] = ROLLOUT | {"transitions_per_prompt": 2, "samples_per_prompt": 2}
        changed["train"] |= {"train_batch_size": 4, "max_train_steps": 2}
        for section, values in sections.items():
            changed[section] = {**changed.get(section, {}), **values}
        return changed

    return make


def test_accumulation_equals_the_large_batch(online, run, tmp_path):
    # A threshold that some pairs miss: a micro-batch of them has fewer, or none.
    content = online("spo", rollout={"threshold": 0.02})
    large = variant(content, tmp_path, "large")
    split = variant(content, tmp_path, "split", train={"train_batch_size": 1, "gradient_accumulation_steps": 4})
    line = run(large)
    run(split)
    assert 0 < line["kept"] < 1
    assert_close(weights(large, 2), weights(split, 2))


@pytest.mark.parametrize("name", ["spo", "ddpo"])
def test_resumed_is_uninterrupted(name, online, run, tmp_path):
    content = online(name, train={"max_train_steps": 4}, rollout={"updates": 2, "min_count": 2})
    whole, halves = (variant(content, tmp_path, part) for part in ("whole", "halves"))
    run(whole)
    halves["train"]["max_train_steps"] = 2
    run(halves)
    halves["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    run(halves)
    assert_same_bits(weights(whole), weights(halves))


def test_gradspo_samples_with_an_average_that_survives_a_resume(online, run, tmp_path):
    how = {"likelihood": "score_matching", "ema_decay": 0.5}
    content = online("spo", train={"max_train_steps": 4}, rollout=how)
    whole, halves = (variant(content, tmp_path, part) for part in ("whole", "halves"))
    assert run(whole)["margin"] != 0
    halves["train"]["max_train_steps"] = 2
    run(halves)
    halves["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    run(halves)
    assert_same_bits(weights(whole), weights(halves))


def test_nothing_to_learn_from_leaves_the_weights(online, run):
    content = online("spo", rollout={"threshold": 0.999})
    line = run(content)
    assert line["kept"] == 0
    assert line["grad_norm"] == 0
    assert not any(tensor.any() for key, tensor in weights(content, 2).items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["ddpo", pytest.param("spo", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(name, online, tmp_path):
    runs = {"one": (4, []), "two": (2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])}
    found = {}
    # The threshold leaves the processes different numbers of pairs.
    how = {"ddpo": {"min_count": 2}, "spo": {"threshold": 0.02}}[name]
    for ranks, (batch, launcher) in runs.items():
        content = online(name, rollout=how)
        content["train"] |= {"output_dir": str(tmp_path / ranks), "train_batch_size": batch}
        file = tmp_path / f"{ranks}.yaml"
        file.write_text(yaml.safe_dump(configuration.check(content).model_dump(mode="json", exclude_none=True)))
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *launcher, "-m", "diffalign", "train", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found[ranks] = load_file(tmp_path / ranks / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    for key, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][key], tensor, rtol=2e-2, atol=2e-4)
    assert max(t.abs().max().item() for key, t in found["one"].items() if "lora_B" in key) > 1e-3


WRONG = {
    "data.prompts_file": {"data": {"prompts_file": None, "train_data_dir": "pairs"}},
    "rollout.scorer": {"rollout": {"scorer": None}},
    'rollout.collect of "spo" must be': {"rollout": {"collect": "trajectories"}},
    "loss.anchor_weight has no effect": {"loss": {"anchor_weight": 1.0}},
    "multiples of rollout.updates 2": {"rollout": {"updates": 2}, "train": {"max_train_steps": 3}},
    "score_matching is for step_pairs": {"rollout": {"likelihood": "score_matching", "num_inner_steps": 1}},
    "winner_guidance is for step_pairs without inner": {"rollout": {"winner_guidance": 1.0, "num_inner_steps": 1}},
    "winner_guidance is for .* likelihood gaussian": {
        "rollout": {"winner_guidance": 1.0, "likelihood": "score_matching"}
    },
    "without loss scaling": {"rollout": {"winner_guidance": 1.0}, "train": {"mixed_precision": "fp16"}},
    "divert_start_step must be below": {"rollout": {"divert_start_step": 4}},
    "threshold_high must not be below": {"rollout": {"threshold": 0.3, "threshold_high": 0.2}},
}


@pytest.mark.parametrize("expected", WRONG)
def test_impossible_settings_are_refused(expected, online):
    with pytest.raises(ConfigError, match=expected):
        configuration.check(online("spo", **WRONG[expected]))


@pytest.mark.parametrize(("name", "how"), [("refl", {}), ("draft", {"backprop_steps": 2})])
def test_repeats_of_the_last_step_are_for_draft_1(name, how, online):
    with pytest.raises(ConfigError, match="last_step_noises is for last_steps with backprop_steps 1"):
        configuration.check(online(name, rollout={"last_step_noises": 2, "transitions_per_prompt": None, **how}))


@pytest.mark.parametrize("shared", [None, True])
def test_ddpo_starts_from_one_noise_a_prompt_where_it_is_told_to(shared, online):
    config = configuration.check(online("ddpo", rollout={"shared_noise": shared, "num_inference_steps": 2}))
    trainer, _ = build_trainer(config, make_accelerator(config), Console(quiet=True))
    starts = trainer.loss.collect([0], 0).transitions.xt[[0, 2]]  # of the two trajectories
    assert torch.equal(*starts) == bool(shared)


def test_prompts_are_refused_by_objectives_of_given_images(online):
    with pytest.raises(ConfigError, match="learns from given ones"):
        configuration.check(online("dpo"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scorer": "oracle"}, "must not be trained on"),
        ({"scorer": f"{ROLLOUT['scorer']},hpsv2={ASSETS / 'tiny-hpsv2'}"}, "needs one reward model"),
        ({"transitions_per_prompt": 4}, "more than the 3 transitions"),
        ({"transitions_per_prompt": 3}, "is no multiple of the 3"),
    ],
)
def test_impossible_rollouts_are_refused(settings, expected, online, run):
    with pytest.raises(ConfigError, match=expected):
        run(online("spo", rollout=settings))
