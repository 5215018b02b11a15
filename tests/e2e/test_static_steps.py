"""Runs with performance.cuda_graphs: step leave the weights of runs without, bit for bit, on a recorder of the CPU."""

import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console

from diffalign import config as configuration
from diffalign.jobs.training import static
from diffalign.training import metrics
from tests.e2e.test_training import assert_same_bits, variant, weights
from tests.tiny import tiny_transformer_qwen, tiny_unet_sdxl
from tests.training.tape import Tape

STEP = {"cuda_graphs": "step"}


@pytest.fixture
def recorder(monkeypatch):
    """Record on the CPU; return the recordings that were made."""
    made = []

    class Noted(Tape):
        def record(self, function):
            made.append(function)
            return super().record(function)

    monkeypatch.setattr(static, "recorder", Noted)
    return made


def lines(folder):
    left_out = ("pairs_per_second", "peak_memory_gib")
    return [{k: v for k, v in line.items() if k not in left_out} for line in metrics.read(folder / "metrics.jsonl")]


def test_a_run_and_a_resumed_run_leave_the_same_bits(content, run, tmp_path, recorder):
    """Two micro-steps an optimizer step, and a reference that follows: `.grad` and both sets of weights must stay."""
    content["train"] |= {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    content["reference"] = {"update": "ema", "decay": 0.5, "every": 1}
    eager = variant(content, tmp_path, "eager")
    run(eager)
    assert not recorder
    replayed = variant(content, tmp_path, "replayed", performance=STEP)
    run(replayed)
    assert len(recorder) == 1
    assert_same_bits(weights(eager), weights(replayed))
    assert lines(tmp_path / "eager") == lines(tmp_path / "replayed")
    halves = variant(content, tmp_path, "halves", performance=STEP, train={"max_train_steps": 2})
    run(halves)
    halves["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    run(halves)
    assert len(recorder) == 3
    assert_same_bits(weights(eager), weights(halves))


OBSTACLES = {
    "there is no GPU": {},
    "another beta": {"loss": {"auto_beta": 0.2}},
    "random numbers on the host": {"train": {"gradient_checkpointing": True}},
    "several processes": {},
    "the loss scale": {},
    "prompts of unequal lengths": {},
}


@pytest.mark.parametrize(("why", "sections"), OBSTACLES.items(), ids=OBSTACLES)
def test_what_stays_eager_says_why(why, sections, content, tmp_path, monkeypatch, run):
    config = configuration.check(variant(content, tmp_path, "run", **sections, performance=STEP))
    network = tiny_transformer_qwen if why == "prompts of unequal lengths" else tiny_unet_sdxl
    accelerator, unet = Accelerator(cpu=True), network()
    if why != "there is no GPU":
        monkeypatch.setattr(static, "recorder", Tape)
    if config.train.gradient_checkpointing is True:
        unet.enable_gradient_checkpointing()
    if why == "several processes":
        accelerator.state.distributed_type = DistributedType.MULTI_GPU  # `run` forgets it
    if why == "the loss scale":
        accelerator.scaler = torch.amp.GradScaler("cpu")
    console = Console(file=io.StringIO(), width=200)
    assert static.static_step(config, None, unet, accelerator, console) is None
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith('performance.cuda_graphs "step" is ignored:')
    assert why in line


@pytest.mark.parametrize(("given", "meant"), [(True, "passes"), (False, "none"), ("step", "step")])
def test_it_once_was_a_switch(given, meant, content):
    content["performance"] = {"cuda_graphs": given}
    assert configuration.check(content).performance.cuda_graphs == meant
