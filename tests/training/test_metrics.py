import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from diffalign.training import metrics
from diffalign.training.metrics import MetricsError, MetricsLog, RunningMean


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_means_weigh_examples_and_not_batches(accelerator):
    mean = RunningMean()
    mean.add({"loss": torch.tensor([1.0, 2.0, 3.0])})
    mean.add({"loss": torch.tensor([10.0]), "grad_norm": torch.tensor(0.5)})
    mean.add({"grad_norm": torch.tensor(1.5)})
    assert mean.pop(accelerator) == {"loss": 4.0, "grad_norm": 1.0}


def test_a_mean_starts_again_after_it_was_read(accelerator):
    mean = RunningMean()
    mean.add({"loss": torch.tensor([100.0])})
    mean.pop(accelerator)
    mean.add({"loss": torch.tensor([1.0])})
    assert mean.pop(accelerator) == {"loss": 1.0}


def test_sums_are_exact_enough_for_many_small_values(accelerator):
    mean = RunningMean()
    mean.add({"loss": torch.tensor([1e8])})
    for _ in range(1000):
        mean.add({"loss": torch.tensor([1.0])})
    assert mean.pop(accelerator)["loss"] == pytest.approx((1e8 + 1000) / 1001, rel=1e-6)


def test_lines_hold_metrics_throughput_and_memory(tmp_path, accelerator, monkeypatch):
    clock = iter([10.0, 14.0, 16.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", accelerator, 0, pairs_per_step=8)
    returned = [log.write(5, {"loss": 0.5}), log.write(10, {"loss": 0.25})]
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert lines == returned
    assert [line["step"] for line in lines] == [5, 10]
    assert [line["pairs_per_second"] for line in lines] == [5 * 8 / 4.0, 5 * 8 / 2.0]
    assert lines[0]["peak_memory_gib"] > 0.01


def test_lines_beyond_the_resumed_step_are_cut(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4)))
    log = MetricsLog(path, accelerator, 2, pairs_per_step=1)
    assert log.last == {"step": 2, "loss": 1.0}
    log.write(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in metrics.read(path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert metrics.read(path) == [{"step": 1, "loss": 1.0}]
    MetricsLog(path, accelerator, 2, pairs_per_step=1).write(3, {"loss": 3.0})
    assert [line["step"] for line in metrics.read(path)] == [1, 3]


def test_no_file_has_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_time_for_checkpoints_is_no_training_time(tmp_path, accelerator, monkeypatch):
    clock = iter([10.0, 12.0, 112.0, 114.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    log = MetricsLog(tmp_path / "metrics.jsonl", accelerator, 0, pairs_per_step=8)
    with log.paused():
        pass
    assert log.write(1, {"loss": 0.5})["pairs_per_second"] == 8 / 4.0


def test_a_full_disk_is_the_users_to_mend(tmp_path, accelerator):
    log = MetricsLog(tmp_path / "metrics.jsonl", accelerator, 0, pairs_per_step=1)
    log.path = Path("/dev/full")  # fails as a full disk does
    with pytest.raises(MetricsError, match=r"Cannot write /dev/full: No space left on device\. .*--resume latest"):
        log.write(1, {"loss": 0.5})


def test_a_folder_that_is_a_file_is_named(tmp_path, accelerator):
    (tmp_path / "run").write_text("")
    with pytest.raises(MetricsError, match=r"Cannot write .*run/metrics\.jsonl: "):
        MetricsLog(tmp_path / "run" / "metrics.jsonl", accelerator, 0, pairs_per_step=1)
