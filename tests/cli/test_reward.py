"""`diffalign reward`: train and convert on the tiny scorers."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reward_models
from diffalign.cli import app
from diffalign.errors import UserError
from tests.jobs.material import png, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return pairs of two grey levels; the brighter one wins."""
    rows = [(png(200, i), png(40, i), 1.0, f"a circle {i % 5}") for i in range(20)]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)


def invoke(*arguments):
    return CliRunner().invoke(app, ["reward", *map(str, arguments)])


def test_training_leaves_a_scorer_that_learnt(scorer_folders, pairs, tmp_path):
    out = tmp_path / "pick"
    arguments = ["--init", scorer_folders["pickscore"], "--out", out, "--max-steps", 12, "--batch-size", 8]
    done = invoke(
        "train", "pickscore", pairs, *arguments, "--learning-rate", 1e-3, "--warmup-steps", 1, "--eval-every", 4
    )
    assert done.exit_code == 0, done.output
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 12
    assert json.loads((out / "recipe.json").read_text())["learning_rate"] == 1e-3
    images = [torch.full((3, 32, 32), 0.8), torch.full((3, 32, 32), 0.15)]
    before, after = (reward_models.load("pickscore", folder) for folder in (scorer_folders["pickscore"], out))
    gap = [scorer.score(images, ["a circle 0"] * 2) for scorer in (before, after)]
    assert gap[1][0] - gap[1][1] > gap[0][0] - gap[0][1]


def test_unknown_recipes_and_a_missing_model_are_refused(scorer_folders, pairs, tmp_path):
    done = invoke("train", "pickscore", pairs, "--out", tmp_path / "x", "--recipe", "mine")
    assert isinstance(done.exception, UserError)
    assert 'Unknown recipe "mine"' in str(done.exception)
    done = invoke("train", "step_aware", pairs, "--out", tmp_path / "x", "--init", scorer_folders["pickscore"])
    assert isinstance(done.exception, UserError)
    assert "--model assets/tiny-sdxl" in str(done.exception)


def test_a_dry_run_tells_the_plan_and_writes_nothing(scorer_folders, pairs, tmp_path):
    arguments = ["--init", scorer_folders["hpsv2"], "--out", tmp_path / "x", "--max-steps", 9, "--dry-run"]
    done = invoke("train", "hpsv2", pairs, *arguments)
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "16 pairs to train on, 4 held out" in told
    assert "9 steps of 128 pairs (9.0 epochs), loss hps" in told
    assert not (tmp_path / "x").exists()


def test_a_step_aware_model_starts_from_a_pickscore_and_learns_from_predictions(scorer_folders, tmp_path):
    """Predictions are kept: a second run makes none again."""
    pairs = write_pairs(tmp_path / "pairs.parquet", [(png(200, i), png(40, i), 1.0, f"a circle {i}") for i in range(6)])
    common = ["--init", scorer_folders["pickscore"], "--out", tmp_path / "spm", "--model", "assets/tiny-sdxl"]
    common += ["--draws", 1, "--batch-size", 4, "--learning-rate", 1e-3, "--warmup-steps", 0, "--max-steps", 2]
    done = invoke("train", "step_aware", pairs, *common, "--validation-fraction", 0.2)
    assert done.exit_code == 0, done.output
    assert "t = 951:" in " ".join(done.output.split())
    kept = sorted((tmp_path / "spm" / "predictions").rglob("*.npy"))
    assert len(kept) == 5 + 5  # a draw of every training pair, and five timesteps of the held-out one
    scorer = reward_models.load("step_aware", tmp_path / "spm")
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(scorer.score([image], ["a"], 0), scorer.score([image], ["a"], 951))
    stamps = [file.stat().st_mtime_ns for file in kept]
    assert invoke("train", "step_aware", pairs, *common, "--validation-fraction", 0.2).exit_code == 0
    assert [file.stat().st_mtime_ns for file in kept] == stamps


def test_converting_keeps_every_score(scorer_folders, tmp_path):
    out = tmp_path / "converted"
    assert invoke("convert", "hpsv2", scorer_folders["hpsv2"], "--out", out).exit_code == 0
    assert list(Path(out).glob("*.safetensors"))
    image = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))]
    first, second = (
        reward_models.load("hpsv2", folder).score(image, ["a"]) for folder in (scorer_folders["hpsv2"], out)
    )
    assert torch.equal(first, second)
