"""A run that a scheduler stops: it saves its step, says how to go on, and its folder is its own until then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign.errors import ConfigError
from diffalign.folder_lock import held
from tests.e2e.test_training import assert_same_bits, variant
from tests.training.toy import trajectory

ROOT = Path(__file__).parents[2]


def start(content, file: Path) -> subprocess.Popen:
    """Start `diffalign train` and return it when it has taken two steps."""
    file.write_text(yaml.safe_dump(content))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # other sums round otherwise
    process = subprocess.Popen(
        [sys.executable, "-m", "diffalign", "train", file], env=environment, stderr=subprocess.PIPE, text=True
    )
    log = Path(content["train"]["output_dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 1:
            break
        time.sleep(0.05)
    return process


def test_sigterm_loses_no_step_and_the_folder_has_one_run(content, run, tmp_path):
    steps = {"max_train_steps": 60, "checkpointing_steps": 1000}
    whole, told = (variant(content, tmp_path, name, train=steps) for name in ("whole", "told"))
    process = start(told, tmp_path / "told.yaml")
    try:
        with pytest.raises(ConfigError, match=rf"told is in use by process {process.pid} on .* train .*told\.yaml"):
            with held(tmp_path / "told"):  # as a second run takes it
                pass
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, said
    (saved,) = (tmp_path / "told").glob("checkpoint-*")
    step = int(saved.name.rpartition("-")[2])
    assert 2 <= step < 60
    assert said.splitlines()[-1] == (
        f"Interrupted: SIGTERM. Stopped after step {step} of 60, which is saved in {saved}. The same command with "
        "--resume latest goes on."
    )
    assert [line["step"] for line in trajectory(tmp_path / "told")] == list(range(1, step + 1))
    end = {"max_train_steps": step + 2}  # the rest proves nothing more
    with pytest.raises(ConfigError, match=rf"told holds {saved.name} of an earlier run\. Continue that with --resume"):
        run(told, overwrite=False)
    told["train"] |= {"resume_from_checkpoint": "latest", **end}
    whole["train"] |= end
    run(told)
    run(whole)
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("told", "whole")]
    assert_same_bits(*weights)
    assert trajectory(tmp_path / "told") == trajectory(tmp_path / "whole")
