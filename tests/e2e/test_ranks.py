"""Two processes on the CPU train the same weights as one, launched as users launch them: DDP, FSDP2, DeepSpeed."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffalign import config as configuration
from diffalign.backbones import loading
from diffalign.cli import app
from diffalign.training import metrics
from tests.jobs.material import png, write_pairs, write_scorers

ROOT = Path(__file__).parents[2]
EXPORTED = {"lora": "pytorch_lora_weights.safetensors", "full": "*/diffusion_pytorch_model.safetensors"}
CHECKPOINTED = {"lora": "pytorch_lora_weights.safetensors", "full": "trainable.safetensors"}
PARTS = {
    "ddp": "",
    "torchrun": "",
    "fsdp2": "FSDP2: weights, gradients and optimizer state in 2 parts",
    "deepspeed-zero2": "DeepSpeed ZeRO-2: gradients and optimizer state in 2 parts",
}
RATE = {"lora": 1e-3, "full": 1e-4}


def launch(kind, *arguments):
    """Run diffalign on two CPU processes: by `accelerate launch` with the shipped configuration `kind`, or torchrun.

    Of the CPUs accelerate is told by its own variable; torchrun says nothing of them.
    """
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if kind == "torchrun":
        del environment["ACCELERATE_USE_CPU"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        config = f"configs/accelerate/{kind}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command = [*launcher, "-m", "diffalign", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return " ".join(done.stdout.split())


def weights_at(output_dir, pattern):
    """Return the tensors of the one file of a run that `pattern` names."""
    (file,) = output_dir.glob(pattern)
    return load_file(file)


def launch_train(kind, content, file, *overrides):
    """Train a configuration on two processes."""
    file.write_text(yaml.safe_dump(configuration.check(content).model_dump(mode="json", exclude_none=True)))
    return launch(kind, "train", file, *overrides)


# Each of the default suite is there for what the others do not have: Qwen-Image for weights that no gradient reaches.
CASES = [
    ("tiny_sdxl", "torchrun", "lora"),
    ("tiny_sdxl", "fsdp2", "full"),
    ("tiny_sdxl", "deepspeed-zero2", "full"),
    ("tiny_sd3", "fsdp2", "lora"),
    ("tiny_qwen", "ddp", "full"),
]
SLOW = [
    ("tiny_sdxl", "deepspeed-zero2", "lora"),
    ("tiny_sdxl", "ddp", "full"),
    ("tiny_sdxl", "fsdp2", "lora"),
    ("tiny_sd3", "ddp", "lora"),
    ("tiny_sd3", "ddp", "full"),
    ("tiny_sd3", "fsdp2", "full"),
    ("tiny_sd3", "deepspeed-zero2", "lora"),
    ("tiny_sd3", "deepspeed-zero2", "full"),
    ("tiny_qwen", "ddp", "lora"),
    ("tiny_qwen", "fsdp2", "full"),
    ("tiny_qwen", "deepspeed-zero2", "full"),
    ("tiny_klein", "ddp", "full"),
    ("tiny_klein", "fsdp2", "full"),
    ("tiny_zimage", "ddp", "full"),
    ("tiny_zimage", "fsdp2", "full"),
]


@pytest.mark.parametrize(
    ("model", "kind", "tune"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_ranks_equal_one(content, run, request, tmp_path, model, kind, tune):
    if "deepspeed" in kind:
        pytest.importorskip("deepspeed")
    content["model"] = {"pretrained_model_name_or_path": str(request.getfixturevalue(model)), "tune": tune}
    content["optimizer"] = {"learning_rate": RATE[tune], "use_ema": True}
    content["train"]["max_train_steps"] = 2
    one, two = copy.deepcopy(content), copy.deepcopy(content)
    one["train"]["output_dir"] = str(tmp_path / "one")
    two["train"] |= {"output_dir": str(tmp_path / "two"), "train_batch_size": 2}
    run(one)
    printed = launch_train(kind, two, tmp_path / "two.yaml")
    assert "2 pairs x 1 accumulation steps x 2 processes = 4 pairs" in printed
    assert printed.count("step 2/2 loss") == 1  # by one of the processes
    assert PARTS[kind] in printed
    assert ("in 2 parts" in printed) == (kind not in ("ddp", "torchrun"))
    start = loading.load(content["model"]["pretrained_model_name_or_path"]).denoiser.state_dict()
    for file in (f"checkpoint-2/{CHECKPOINTED[tune]}", EXPORTED[tune]):
        ours, theirs = (weights_at(tmp_path / name, file) for name in ("two", "one"))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=2e-2, atol=2e-4 if tune == "lora" else 2e-5, msg=name)
        moved = {name: t if tune == "lora" else t - start[name] for name, t in theirs.items() if "lora_A" not in name}
        assert max(t.abs().max().item() for t in moved.values()) > 1e-4  # not trivially equal
    lines = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert lines[1][0]["margin"] == 0.0
    for ours, theirs in zip(*lines, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd3"])
def test_a_sharded_run_resumes_to_the_bit(content, request, tmp_path, model):
    content["model"] = {"pretrained_model_name_or_path": str(request.getfixturevalue(model)), "tune": "full"}
    content["optimizer"] = {"learning_rate": 1e-4, "use_ema": True}
    content["train"] |= {
        "train_batch_size": 2,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "mixed_precision": "bf16",
    }
    content["validation"] = {"validation_steps": 1, "validation_prompts": ["a red circle"], "num_inference_steps": 2}
    for name, lengths in {"whole": [2], "halves": [1, 2]}.items():
        for steps in lengths:
            there = [f"train.output_dir={tmp_path / name}", f"train.max_train_steps={steps}", "--resume", "latest"]
            printed = launch_train("fsdp2", content, tmp_path / "run.yaml", *there)
    assert "Resuming from" in printed
    for file in ("checkpoint-2/trainable.safetensors", EXPORTED["full"]):
        whole, halves = (weights_at(tmp_path / name, file) for name in ("whole", "halves"))
        assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_two_ranks_train_the_reward_model_of_one(tmp_path):
    start = write_scorers(tmp_path / "scorers")["pickscore"]
    rows = [(png(200, i), png(40, i), 1.0, f"a circle {i % 5}") for i in range(20)]
    command = ["reward", "train", "pickscore", write_pairs(tmp_path / "pairs.parquet", rows), "--init", start]
    command += ["--max-steps", 3, "--batch-size", 6, "--learning-rate", 1e-3, "--warmup-steps", 1, "--eval-every", 3]
    done = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "one"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    launch("torchrun", *command, "--out", tmp_path / "two")
    weights = [load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "one", tmp_path / "two")]
    assert max((weights[1][name] - tensor).abs().max().item() for name, tensor in weights[0].items()) > 1e-3
    for name, tensor in weights[1].items():
        if not name.endswith("k_proj.bias"):  # has no gradient but rounding errors, which Adam makes steps of
            torch.testing.assert_close(weights[2][name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    lines = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
