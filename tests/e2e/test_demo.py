"""The demo: everything it promises to leave, at a few steps; and its claim, at full length (slow)."""

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from diffalign.jobs.world import demo
from diffalign.training.checkpoints import CheckpointError

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "assets" / "prompts" / "tiny-held-out.txt"


def test_a_short_demo_leaves_everything(tmp_path, monkeypatch, run):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "N_PROMPTS", 6)
    short = tmp_path / "short.yaml"
    short.write_text(
        f"base: {ROOT / 'configs/tiny/dpo.yaml'}\n"
        f"data: {{max_train_samples: 32, cache_dir: {tmp_path / 'cache'}}}\n"
        "train: {max_train_steps: 3, train_batch_size: 4, checkpointing_steps: 3}\n"
        "logging: {report_to: []}\n"
    )
    output = tmp_path / "demo"
    demo.demo(short, output, HELD_OUT, 0, Console(quiet=True))
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["scorers"]) == {"oracle", "pickscore", "hpsv2"}
    for result in summary["scorers"].values():
        assert {"base", "aligned", "win_rate", "ci_low", "ci_high", "n_prompts"} <= result.keys()
    assert summary["n_prompts"] == 6
    assert summary["pairs_per_second"] > 0
    assert Image.open(output / "grid.png").width > 500
    assert (output / "report.html").stat().st_size > 50_000
    with pytest.raises(CheckpointError, match=r"train\.seed: 0 there, 1 now"):
        demo.demo(short, output, HELD_OUT, 1, Console(quiet=True))
    demo.demo(short, output, HELD_OUT, 1, Console(quiet=True), overwrite=True)  # another seed into the same folder
    assert json.loads((output / "summary.json").read_text())["scorers"] != summary["scorers"]
    left = {path.name for path in output.iterdir()}
    assert left >= {"scores.parquet", "scores.csv", "pytorch_lora_weights.safetensors", "README.md", "metrics.jsonl"}


@pytest.mark.slow
def test_the_demo_aligns(tmp_path, monkeypatch, run):
    monkeypatch.chdir(ROOT)
    summary = demo.demo(ROOT / "configs/tiny/dpo.yaml", tmp_path / "demo", HELD_OUT, 0, Console(quiet=True))
    oracle = summary["scorers"]["oracle"]
    assert oracle["n_prompts"] >= 200
    assert oracle["ci_low"] > 0.5
