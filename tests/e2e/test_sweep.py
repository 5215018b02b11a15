"""`diffalign train --sweep`: a run for each value on one set of caches, resumed, and compared at the end."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.evaluating import sweep
from diffalign.jobs.training import preflight
from diffalign.training import metrics
from tests.e2e.test_ranks import launch

PAIRS = 21  # 24 rows without their ties
BETAS = ("objective.beta=1e3", "objective.beta=5000")


@pytest.fixture
def file(content, tmp_path):
    """Write the configuration of a run of one epoch that keeps the reference's errors."""
    content["reference"] = {"cache_draws": 1}
    content["data"] |= {"cache_dir": str(tmp_path / "cache")}
    content["train"] |= {"train_batch_size": 7, "max_train_steps": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


@pytest.fixture(autouse=True)
def _fresh_state():
    """Take the accelerator's state of other tests away; a sweep leaves none."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_sweep_shares_caches_and_is_compared_and_resumed(file, diffalign, evaluated, tmp_path):
    words = ("train", file, "--sweep", "objective.beta=1e3,5000")
    code, said = diffalign(*words)
    assert code == 0
    folders = [tmp_path / "run" / name for name in BETAS]
    assert sum(evaluated) == 2 * PAIRS  # by the first of the two alone
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1
    betas = [yaml.safe_load((folder / "config.yaml").read_text())["objective"]["beta"] for folder in folders]
    assert betas == [1000.0, 5000.0]
    table = pd.read_csv(tmp_path / "run" / "sweep.csv")
    last = [metrics.read(folder / "metrics.jsonl")[-1] for folder in folders]
    assert table["run"].tolist() == list(BETAS)
    assert table["objective.beta"].tolist() == [1000, 5000]
    for name in ("step", "loss", "margin", "grad_norm"):
        assert table[name].tolist() == pytest.approx([line[name] for line in last])
    assert last[0]["loss"] != last[1]["loss"]
    markdown = (tmp_path / "run" / "sweep.md").read_text()
    assert f"| {BETAS[1]} | 3 | {last[1]['loss']:.4g} |" in markdown
    assert "Last metrics of every run" in said

    written = [(folder / "README.md").stat().st_mtime_ns for folder in folders]
    (folders[1] / "README.md").unlink()  # as if it had been killed before its result was written
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle on a blue background\ntwo green stars on a black background\n")
    judged = ("--prompts", prompts, "--with", "oracle", "validation.num_inference_steps=2")
    code, said = diffalign(*words, "--resume", "latest", *judged[-1:])
    assert code == 0
    assert "1/2 objective.beta=1e3 ─" in said  # another setting: not taken for finished
    code, said = diffalign(*words, "--resume", "latest", *judged)
    assert code == 0
    assert "1/2 objective.beta=1e3: finished before" in said
    assert "2/2 objective.beta=5000: finished before" in said
    assert (folders[0] / "README.md").stat().st_mtime_ns > written[0]
    table = pd.read_csv(tmp_path / "run" / "sweep.csv")
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert summary["baseline"] == "base"
    scores = pd.read_parquet(tmp_path / "run" / "evaluation" / "scores.parquet")
    means = scores.groupby("model")["score"].mean()
    assert table["oracle"].tolist() == pytest.approx([means[name] for name in BETAS])
    assert table["oracle win rate"].between(0, 1).all()


def test_all_runs_are_checked_before_the_first_starts(file, diffalign, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "installed", lambda package: False)
    words = ("--sweep", "objective.name=dpo,smpo", "report_to=[wandb]", "reference.cache_draws=null")
    code, said = diffalign("train", file, *words)
    assert code == 2
    assert '2 things would stop this run: 1. logging.report_to names "wandb", which is not installed' in said
    assert '2. "smpo" needs P(winner preferred)' in said
    assert said.endswith("(of objective.name=smpo)")  # the first is of both
    code, said = diffalign("train", file, "--sweep", "objective.beta=1000,none")
    assert code == 2
    assert said.endswith("(of objective.beta=none)")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_lists_the_runs(file, diffalign, tmp_path):
    code, said = diffalign("train", file, "--sweep", "beta=1,2", "--sweep", "lora.blocks=[mid,up],[up]", "--dry-run")
    assert code == 0
    assert "4 runs, one after another" in said
    assert f"{tmp_path / 'run' / 'beta=2,lora.blocks=mid-up'} " in said
    assert "DPO(beta=1.0" in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_does_not_end_the_sweep(file, monkeypatch, tmp_path, diffalign):
    # A learning rate beyond float32's range is refused by no check, and gives weights that are not finite.
    code, _ = diffalign("train", file, "--sweep", "learning_rate=1e38,1e-4")
    table = pd.read_csv(tmp_path / "run" / "sweep.csv")
    assert (code, table["outcome"].tolist()) == (0, [sweep.STOPPED, sweep.DONE])
    assert table["step"].iloc[1] == 3
    assert "| outcome |" in (tmp_path / "run" / "sweep.md").read_text()


WRONG = {
    "names a key twice": ["objective.beta=1", "objective.beta=2"],
    "has the same values twice: objective.beta=1": ["objective.beta=1,1"],
    "written KEY=VALUE,VALUE": ["objective.beta"],
    "every run has its own": ["output_dir=a,b"],
    "is not valid YAML": ["objective.beta=1,,2"],
    'Unknown key "objective.betta"': ["objective.betta=1"],
}


@pytest.mark.parametrize("message", WRONG)
def test_sweeps_that_make_no_sense_are_refused(file, message):
    with pytest.raises(ConfigError, match=message):
        sweep.runs_of(file, [], WRONG[message])


def test_names_are_safe_and_distinct(file):
    paths = ",".join(f"/some/folder/{'x' * 150}/{name}" for name in "ab")
    names = [run.name for run in sweep.runs_of(file, [], [f"model.unet_init={paths},null"])]
    assert len(set(names)) == 3
    assert names[2] == "model.unet_init=null"
    assert all(len(name) <= sweep.LONGEST and "/" not in name for name in names)


def test_comparing_needs_prompts_and_judges_and_a_sweep(file, diffalign):
    assert "give both or neither" in diffalign("train", file, "--sweep", "beta=1,2", "--with", "oracle")[1]
    assert "diffalign evaluate" in diffalign("train", file, "--with", "oracle", "--prompts", "embedded")[1]
    assert "Use latest" in diffalign("train", file, "--sweep", "beta=1,2", "--resume", "checkpoint-1")[1]


@pytest.mark.slow
def test_two_processes_train_each_run_together(file, tmp_path):
    assert torch.distributed.is_available()
    said = launch("ddp", "train", file, "--sweep", "objective.beta=1000,5000", "train_batch_size=2")
    assert "2 processes = 4 pairs per optimizer step" in said
    table = pd.read_csv(Path(tmp_path) / "run" / "sweep.csv")
    assert table["step"].tolist() == [3, 3]
    assert configuration.load(tmp_path / "run" / "objective.beta=5000" / "config.yaml").objective["beta"] == 5000.0
