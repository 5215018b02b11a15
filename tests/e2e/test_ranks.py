"""Two processes on the CPU train the same weights as one, through the command line."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from diffalign import config as configuration

ROOT = Path(__file__).parents[2]


def test_two_ranks_equal_one(content, tmp_path):
    runs = {"one": (4, []), "two": (2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])}
    weights = {}
    for name, (pairs, launcher) in runs.items():
        content["train"] |= {"output_dir": str(tmp_path / name), "train_batch_size": pairs, "max_train_steps": 2}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(configuration.check(content).model_dump(mode="json", exclude_none=True)))
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "diffalign", "train", str(file)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"x {2 if launcher else 1} processes = 4 pairs" in " ".join(done.stdout.split())
        weights[name] = load_file(tmp_path / name / "checkpoint-2" / "trainable.safetensors")
    for name, tensor in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], tensor, rtol=2e-2, atol=2e-4)
    assert max(t.abs().max().item() for name, t in weights["one"].items() if "lora_B" in name) > 1e-3
