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
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(history) == 12
    assert json.loads((out / "recipe.json").read_text())["learning_rate"] == 1e-3
    images = [torch.full((3, 32, 32), 0.8), torch.full((3, 32, 32), 0.15)]
    before, after = (reward_models.load("pickscore", folder) for folder in (scorer_folders["pickscore"], out))
    gap = [scorer.score(images, ["a circle 0"] * 2) for scorer in (before, after)]
    assert gap[1][0] - gap[1][1] > gap[0][0] - gap[0][1]


def test_only_two_tower_scorers_and_known_recipes(scorer_folders, pairs, tmp_path):
    done = invoke("train", "pickscore", pairs, "--out", tmp_path / "x", "--recipe", "mine")
    assert isinstance(done.exception, UserError)
    assert 'Unknown recipe "mine"' in str(done.exception)


def test_converting_keeps_every_score(scorer_folders, tmp_path):
    out = tmp_path / "converted"
    assert invoke("convert", "hpsv2", scorer_folders["hpsv2"], "--out", out).exit_code == 0
    assert list(Path(out).glob("*.safetensors"))
    image = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))]
    first, second = (
        reward_models.load("hpsv2", folder).score(image, ["a"]) for folder in (scorer_folders["hpsv2"], out)
    )
    assert torch.equal(first, second)
