"""Whole runs that keep the reference's errors: what is evaluated, that equal runs stay equal, and precompute."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from diffalign import config as configuration
from diffalign.jobs.training import networks
from diffalign.training import metrics
from tests.e2e.test_training import assert_same_bits, variant, weights

PAIRS, EPOCH = 21, 3  # 24 rows without their ties; optimizer steps of 7 pairs


@pytest.fixture
def content(content, tmp_path):
    """Return a run of two epochs that keeps one draw of every pair."""
    content["reference"] = {"cache_draws": 1}
    content["data"] |= {"cache_dir": str(tmp_path / "cache"), "random_flip": False}
    content["train"] |= {"train_batch_size": 7, "max_train_steps": 2 * EPOCH, "checkpointing_steps": EPOCH}
    content["logging"]["logging_steps"] = 1
    return content


def lines(content):
    return metrics.read(Path(content["train"]["output_dir"]) / "metrics.jsonl")


def hits(content):
    return [line["reference_cache_hits"] for line in lines(content)]


def test_the_second_epoch_and_a_sweep_run_no_reference(content, run, evaluated, tmp_path):
    first = variant(content, tmp_path, "first")
    run(first)
    assert sum(evaluated) == 2 * PAIRS
    assert hits(first) == [0, 0, 0, 1, 1, 1]
    assert lines(first)[0]["margin"] == 0.0
    sections = {"objective": {"beta": 500.0}, "lora": {"rank": 2}, "train": {"max_train_steps": 1}}
    sweep = variant(content, tmp_path, "sweep", **sections)
    run(sweep)
    assert sum(evaluated) == 2 * PAIRS
    assert hits(sweep) == [1]
    assert lines(sweep)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_resumed_is_uninterrupted_with_a_cache_of_its_own(content, run, tmp_path):
    content["train"]["train_batch_size"] = 5  # an epoch ends within the fifth batch
    whole = variant(content, tmp_path, "whole")
    halves = variant(content, tmp_path, "halves", data={"cache_dir": str(tmp_path / "other")})
    run(whole)
    assert hits(whole)[:4] == [0, 0, 0, 0]
    assert 0 < hits(whole)[4] < 1
    halves["train"]["max_train_steps"] = EPOCH
    run(halves)
    halves["train"] |= {"max_train_steps": 2 * EPOCH, "resume_from_checkpoint": "latest"}
    run(halves)
    assert_same_bits(weights(whole, 2 * EPOCH), weights(halves, 2 * EPOCH))


def test_precompute_leaves_nothing_to_the_reference(content, run, evaluated, diffalign, monkeypatch, tmp_path):
    content["reference"]["cache_draws"] = 2
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configuration.check(content).model_dump(mode="json", exclude_none=True)))
    code, said = diffalign("precompute", file)
    assert code == 0
    assert "21 examples of 2 image(s) at 2 draws" in said
    assert sum(evaluated) == 2 * 2 * PAIRS
    assert max(evaluated) > 2 * content["train"]["train_batch_size"]
    (kept,) = Path(content["data"]["cache_dir"]).glob("reference-*/errors.npy")
    errors = np.load(kept, mmap_mode="r+")
    before = errors.copy()
    assert not np.isnan(errors).any()
    errors[1, 3:8] = np.nan  # as if it had been interrupted
    evaluated.clear()
    assert diffalign("precompute", file)[0] == 0
    assert evaluated == [10]
    np.testing.assert_allclose(np.load(kept), before, rtol=1e-5)
    evaluated.clear()
    monkeypatch.setattr(networks, "_frozen_copy", None)  # full fine-tuning needs no second network now
    full = variant(content, tmp_path, "full", model={"tune": "full"}, optimizer={"learning_rate": 1e-5})
    run(full)
    assert evaluated == []
    assert lines(full)[0]["margin"] * 2000.0 / 2 == pytest.approx(0, abs=1e-3)
    assert lines(full)[-1]["margin"] != pytest.approx(0, abs=1e-6)
