"""`diffalign reward`: train and convert on the tiny scorers."""

import importlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import reward_models
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.jobs.rewards.reward_pairs import read_pairs
from diffalign.jobs.rewards.stored_pictures import Stored, storing
from reward_models import training
from reward_models.preprocess import to_rgb
from reward_models.training_state import states
from tests.jobs.material import png, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return pairs of two grey levels; the brighter one wins."""
    rows = [(png(200, i), png(40, i), 1.0, f"a circle {i % 5}") for i in range(20)]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", rows)


root = importlib.import_module("diffalign.cli.app")  # the package has the app itself under this name


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
    again = invoke("train", "step_aware", pairs, *common, "--validation-fraction", 0.2)
    assert "holds the state of an earlier run. Go on with that by --resume" in str(again.exception)
    assert invoke("train", "step_aware", pairs, *common, "--validation-fraction", 0.2, "--overwrite").exit_code == 0
    assert [file.stat().st_mtime_ns for file in kept] == stamps


def history(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_to_the_same_weights(
    scorer_folders, pairs, tmp_path, monkeypatch
):
    arguments = ["--init", scorer_folders["pickscore"], "--max-steps", 6, "--batch-size", 8, "--warmup-steps", 0]
    arguments += ["--learning-rate", 1e-3, "--eval-every", 4]
    through = invoke("train", "pickscore", pairs, *arguments, "--out", tmp_path / "through", "--resume")
    assert through.exit_code == 0, through.output
    assert "There is nothing to resume in" in " ".join(through.output.split())

    def told_to_stop(run, batch, weights, optimizer, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return take(run, batch, weights, optimizer, step)

    out, take = tmp_path / "told", training._train_step
    with monkeypatch.context() as patched:
        patched.setattr(training, "_train_step", told_to_stop)
        with pytest.raises(root._Stopped) as caught:
            invoke("train", "pickscore", pairs, *arguments, "--out", out)
    stopped = caught.value.__cause__
    assert stopped.exit_code == 143
    assert str(stopped) == (
        f"Stopped after step 2 of 6, which is saved in {out}. The same command with --resume goes on."
    )
    assert [file.name for file in states(out)] == ["training-state-2.pt"]
    assert list(out.glob(".pictures-*")) == []
    with (out / "metrics.jsonl").open("a") as lines:  # of a step after the one that was saved
        lines.write(json.dumps({"step": 3, "learning_rate": 0.0, "loss": 9.0}) + "\n")
    done = invoke("train", "pickscore", pairs, *arguments, "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert history(out) == history(tmp_path / "through")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "through"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [file.name for file in states(out)] == ["training-state-4.pt", "training-state-6.pt"]


def test_pictures_of_a_table_are_read_one_at_a_time(pairs, tmp_path):
    with storing(tmp_path / "pictures") as stored:
        found = read_pairs(str(pairs), tmp_path / "left_out.jsonl", False, stored, None)
        assert len(found) == 20
        assert all(isinstance(image, Stored) for pair in found for image in pair[:2])
        assert [np.asarray(to_rgb(image)).mean() > 100 for image in found[3][:2]] == [True, False]
        assert found[3].image_0.read_bytes() == png(200, 3)
        assert (tmp_path / "pictures").stat().st_size == sum(image.size for pair in found for image in pair[:2])
    assert not (tmp_path / "pictures").exists()


def test_converting_keeps_every_score(scorer_folders, tmp_path):
    out = tmp_path / "converted"
    assert invoke("convert", "hpsv2", scorer_folders["hpsv2"], "--out", out).exit_code == 0
    assert list(Path(out).glob("*.safetensors"))
    image = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))]
    first, second = (
        reward_models.load("hpsv2", folder).score(image, ["a"]) for folder in (scorer_folders["hpsv2"], out)
    )
    assert torch.equal(first, second)
