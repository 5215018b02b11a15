"""What stops a run is found before a model is loaded, all of it, by `diffalign train` and its dry run alike."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.training import assemble, identity, preflight
from diffalign.training import checkpoint
from diffalign.training.batching import BatchPlan
from tests.e2e.pairs import write_lists, write_pairs


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Return a folder with 8 pairs, a folder with lists, and a file of scores that lacks a column."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "pairs", 8)
    write_lists(root / "lists", 4, 3)
    pd.DataFrame({"example_id": [1], "score_chosen": [1.0]}).to_parquet(root / "half.parquet")
    (root / "empty.txt").write_text("\n")
    return root


@pytest.fixture
def content(tiny_sdxl, data, tmp_path, monkeypatch):
    """Return a valid configuration as a dictionary, with a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
        "data": {"train_data_dir": str(data / "pairs"), "resolution": 64, "cache_dir": "cache"},
        "objective": {"name": "dpo"},
        "train": {"output_dir": "run", "train_batch_size": 2, "max_train_steps": 4},
        "logging": {"report_to": []},
    }


def examined(content, **sections):
    changed = {name: {**content.get(name, {}), **values} for name, values in sections.items()}
    return preflight.examine(configuration.check({**content, **changed}))


def test_nothing_is_wrong_with_a_valid_run(content):
    found = examined(content)
    assert (found.faults, found.notes, len(found.source)) == ([], [], 7)
    found.require()
    assert list(Path().iterdir()) == []  # it only looks


FAULTS = {
    "is not a diffusers pipeline: it has no model_index.json": {"model": {"pretrained_model_name_or_path": "{data}"}},
    'There is no model at "/nowhere/vae"': {"model": {"pretrained_vae_model_name_or_path": "/nowhere/vae"}},
    'of variant "fp16"': {"model": {"variant": "fp16"}},
    "resolution must be a positive multiple of 8, got 60": {"data": {"resolution": 60}},
    "There is no file or folder absent": {"data": {"train_data_dir": "absent"}},
    '"dpo" learns from pairs; .* has 3 image': {"data": {"train_data_dir": "{data}/lists"}},
    'needs the columns "example_id" and "score_chosen" with': {"data": {"annotations_file": "{data}/half.parquet"}},
    "There is no file absent.parquet": {"data": {"annotations_file": "absent.parquet"}},
    "must name one reward model, got 'pickscore,hpsv2'": {"data": {"scorer": "pickscore,hpsv2"}},
    'Unknown scorer "pikscore". Did you mean "pickscore"': {"data": {"scorer": "pikscore"}},
    'There is no file or folder "/absent" with weights of pickscore': {"data": {"scorer": "pickscore=/absent"}},
    "Nobody has published weights for composite": {"data": {"scorer": "composite"}},
    r"data.cache_latents: true": {"objective": {"name": "kto"}, "data": {"cache_latents": False}},
    r"needs P\(winner preferred\)": {"objective": {"name": "smpo"}},
    'needs bitsandbytes: pip install "diffalign\\[gpu\\]"': {"optimizer": {"name": "adamw_8bit"}},
    "xformers is not installed": {"train": {"enable_xformers_memory_efficient_attention": True}},
    'reference_dtype "fp8" needs': {"performance": {"reference_dtype": "fp8", "compile": "full"}},
    '"wandb", which is not installed: pip install wandb': {"logging": {"report_to": ["wandb"]}},
    "needs a GPU; this machine has none. Use bf16": {"train": {"mixed_precision": "fp16"}},
    "global_batch_size 3 is not divisible": {"train": {"global_batch_size": 3}},
    'There is no checkpoint "checkpoint-9"': {"train": {"resume_from_checkpoint": "checkpoint-9"}},
    "There is no prompt file absent.txt": {"validation": {"validation_steps": 1, "validation_prompts": "absent.txt"}},
}


def filled(values, data):
    return {
        key: value.format(data=data) if isinstance(value, str) and "{data}" in value else value
        for key, value in values.items()
    }


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_is_found(content, data, monkeypatch, message):
    monkeypatch.setattr(preflight, "installed", lambda package: False)
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)
    sections = {name: filled(values, data) for name, values in FAULTS[message].items()}
    if "objective" in sections:
        content["objective"] = {}
    with pytest.raises(Exception, match=message) as raised:
        examined(content, **sections).require()
    assert not isinstance(raised.value, preflight.Refused)  # one alone


ONLINE = {
    "There is no prompt file absent.txt": {"data": {"prompts_file": "absent.txt"}},
    "empty.txt holds no prompt": {"data": {"prompts_file": "{data}/empty.txt"}},
    "must not be trained on": {"rollout": {"scorer": "oracle"}},
    'Unknown scorer "pikscore"': {"rollout": {"scorer": "pikscore"}},
    "must name one folder of LPO's reward model": {"rollout": {"scorer": "lrm"}},
    "there is no folder absent": {"rollout": {"scorer": "lrm=absent"}},
    "is more than the 16 transitions": {"rollout": {"transitions_per_prompt": 17}},
    "is no multiple of the 3": {"rollout": {"transitions_per_prompt": 3}},
}


@pytest.mark.parametrize("message", ONLINE)
def test_each_fault_of_an_online_run_is_found(content, data, tmp_path, message):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    content["objective"], content["rollout"] = {"name": "spo"}, {"scorer": "hpsv2"}
    content["data"] = {"prompts_file": "prompts.txt", "resolution": 64}
    sections = {name: filled(values, data) for name, values in ONLINE[message].items()}
    assert examined(content, train={"train_batch_size": 16}).faults == []
    with pytest.raises(Exception, match=message) as raised:
        examined(content, **sections, train={"train_batch_size": 16}).require()
    assert not isinstance(raised.value, preflight.Refused)


def test_train_and_dry_run_say_the_same_and_load_nothing(content, diffalign, monkeypatch, tmp_path):
    monkeypatch.setattr(assemble, "load_backbone", None)
    content["data"] |= {"resolution": 60, "scorer": "pickscore=/absent"}
    content["train"]["global_batch_size"] = 3
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    said = []
    for option in ((), ("--dry-run",)):
        code, text = diffalign("train", file, *option)
        assert code == 2
        said.append(text[text.index("Error:") :])
    assert said[0] == said[1]
    assert "3 things would stop this run: 1. train.global_batch_size 3" in said[0]
    assert "2. resolution must be" in said[0]
    assert '3. There is no file or folder "/absent" with weights of pickscore' in said[0]
    assert not Path("run").exists()


@pytest.fixture
def checkpointed(content):
    """Leave the state of a checkpoint of step 2 in the run's folder, as the run writes it."""
    config = configuration.check(content)
    known = identity.settings_identity(config, BatchPlan.of(config.train, 1))
    known["model"] |= {"denoiser": "abc"}  # what only the weights say
    checkpoint.save(Path("run"), 2, {}, {}, json.loads(json.dumps(known)), None)
    return content


def test_a_checkpoint_of_this_run_is_continued(checkpointed):
    assert examined(checkpointed, train={"resume_from_checkpoint": "latest"}).notes == [
        "Continues from run/checkpoint-2."
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "dpo", "beta": 3.0}}, r"objective\.beta: 5000\.0 there, 3\.0 now"),
        ({"data": {"resolution": 32}}, r"data\.resolution: 64 there, 32 now"),
        ({"model": {"tune": "full"}}, r"model\.tune: 'lora' there, 'full' now"),
        ({"train": {"max_train_steps": 1}}, "has done 2 steps already"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(checkpointed, sections, message):
    checkpointed["train"]["resume_from_checkpoint"] = "latest"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        examined(checkpointed, **sections).require()


def test_a_fresh_run_does_not_replace_earlier_checkpoints_unasked(checkpointed):
    with pytest.raises(ConfigError, match=r"run holds checkpoint-2 of an earlier run\. Continue that with --resume"):
        examined(checkpointed).require()
    found = preflight.examine(configuration.check(checkpointed), overwrite=True)
    assert found.faults == []
    assert "run holds checkpoint-2 of an earlier run, which this one replaces" in found.notes[0]


def test_a_checkpoint_that_is_cut_is_passed_over_or_refused(checkpointed):
    (Path("run") / "checkpoint-9").mkdir()
    assert examined(checkpointed, train={"resume_from_checkpoint": "latest"}).notes == [
        "Continues from run/checkpoint-2."
    ]
    checkpointed["train"]["resume_from_checkpoint"] = "checkpoint-9"
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint-9 is damaged: state\.json cannot be read"):
        examined(checkpointed).require()
