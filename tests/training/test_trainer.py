import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffalign import interrupts
from diffalign.interrupts import Interrupted
from diffalign.training import sealing
from diffalign.training.checkpoint import CheckpointError
from diffalign.training.trainer import NonFiniteLoss
from tests.training import toy

ROOT = Path(__file__).parent.parent.parent


class Died(Exception):
    """Stands for a run that is killed."""


def die_after(steps: int):
    def on_step(_, finished: int) -> None:
        if finished == steps:
            raise Died

    return on_step


def run(directory: Path, **settings) -> torch.Tensor:
    """Train the toy and return its weights."""
    trainer = toy.trainer(directory, **settings)
    trainer.fit()
    return toy.weights(trainer.policy)


def moved(weights: torch.Tensor) -> float:
    """Return how far weights are from the start: an equality of two runs that stand still proves nothing."""
    return (weights - toy.weights(toy.policy())).abs().max().item()


def test_training_lowers_the_loss_and_leaves_frozen_weights_alone(tmp_path):
    trainer = toy.trainer(tmp_path, max_train_steps=30)
    last = trainer.fit()
    assert last["step"] == 30
    assert last["loss"] < 0.6 * toy.trajectory(tmp_path)[0]["loss"]
    assert torch.equal(trainer.policy[0].weight, toy.policy()[0].weight)
    assert sorted(trainer.parameters) == ["2.bias", "2.weight"]


@pytest.mark.parametrize(("micro", "accumulate"), [(1, 4), (2, 2)])
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path, micro, accumulate):
    small = run(tmp_path / "small", micro=micro, accumulate=accumulate)
    large = run(tmp_path / "large", micro=4, accumulate=1)
    assert moved(large) > 0.05
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(toy.trajectory(tmp_path / "small"), toy.trajectory(tmp_path / "large"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_same_run_twice_is_the_same_to_the_bit(tmp_path):
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    assert moved(first) > 0.05
    assert torch.equal(first, second)
    assert toy.trajectory(tmp_path / "first") == toy.trajectory(tmp_path / "second")


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, use_ema, name):
    common = {"use_ema": use_ema, "ema_decay": 0.5, "name": name, "learning_rate": 0.05}
    straight = run(tmp_path / "straight", **common)
    half = run(tmp_path / "halves", max_train_steps=3, **common)
    both = run(tmp_path / "halves", resume_from_checkpoint="latest", **common)
    assert moved(straight) > 0.01
    assert not torch.allclose(half, straight, atol=1e-3)
    assert torch.equal(both, straight)
    assert toy.trajectory(tmp_path / "halves") == toy.trajectory(tmp_path / "straight")


@pytest.mark.parametrize("lr_scheduler", ["cosine", "linear", "constant_with_warmup"])
def test_a_run_that_died_continues_at_its_checkpoint(tmp_path, lr_scheduler):
    common = {"lr_scheduler": lr_scheduler, "lr_warmup_steps": 4, "checkpointing_steps": 3}
    straight = run(tmp_path / "straight", **common)
    with pytest.raises(Died):
        run(tmp_path / "died", on_step=die_after(5), **common)
    assert [line["step"] for line in toy.trajectory(tmp_path / "died")] == [1, 2, 3, 4, 5]
    resumed = run(tmp_path / "died", resume_from_checkpoint="latest", **common)
    assert moved(straight) > 0.05
    assert torch.equal(resumed, straight)
    assert toy.trajectory(tmp_path / "died") == toy.trajectory(tmp_path / "straight")


def test_the_average_is_what_leaves_and_the_weights_are_what_is_saved(tmp_path):
    raw = run(tmp_path / "raw")
    averaged = run(tmp_path / "averaged", use_ema=True, ema_decay=0.5)
    assert torch.equal(toy.saved(tmp_path / "averaged" / "checkpoint-6"), raw)
    steps = [run(tmp_path / f"{count}", max_train_steps=count) for count in range(1, 7)]
    expected = steps[0]  # diffusers' decay: 0 at the first step, then (1 + n) / (10 + n) up to ema_decay
    for n, weights in enumerate(steps[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averaged, raw, atol=1e-3)


def huge(network, indices, step):
    losses, metrics = toy.loss(network, indices, step)
    return 1e4 * losses, metrics


def first_update(scale: float) -> torch.Tensor:
    """Return the weights after one AdamW step from the start, on the gradient of `huge` times `scale`."""
    network = toy.policy()
    losses, _ = huge(network, toy.trainer(Path("unused")).sampler.indices(0, 4), 0)
    losses.mean().backward()
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad *= scale
    torch.optim.AdamW(parameters, lr=0.2, eps=1.0, weight_decay=1e-2).step()
    return toy.weights(network)


def test_gradients_are_clipped_before_the_step_and_logged_as_they_were(tmp_path):
    clipped = run(tmp_path, loss=huge, max_train_steps=1, max_grad_norm=0.01)
    norm = toy.trajectory(tmp_path)[0]["grad_norm"]
    assert norm > 1e3
    torch.testing.assert_close(clipped, first_update(0.01 / norm), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(clipped, first_update(1.0), atol=1e-2)


def test_the_logged_learning_rates_follow_the_schedule(tmp_path):
    run(tmp_path, lr_scheduler="linear", lr_warmup_steps=2, learning_rate=0.1, scale_lr=True)
    rates = [line["learning_rate"] for line in toy.trajectory(tmp_path)]
    assert rates == pytest.approx([0.4 * factor for factor in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)], rel=1e-6)


def test_the_rate_that_is_logged_is_the_one_that_moves(tmp_path):
    slow = run(tmp_path / "slow", max_train_steps=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=1000)
    fast = run(tmp_path / "fast", max_train_steps=1)
    assert 0 < moved(slow) < 2e-3 * moved(fast)


def broken(what: str, at_step: int):
    """Return a loss whose second example, or whose gradient, is not a number at one step."""

    def loss(network, indices, step):
        losses, metrics = toy.loss(network, indices, step)
        if step == at_step and what == "loss":
            losses = losses * torch.tensor([1.0, float("nan")])
        elif step == at_step:
            losses = losses + (0 * network[2].weight.sum()).abs().sqrt()  # 0, and its gradient 0 * inf
        return losses, metrics

    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_step(tmp_path, what):
    good = run(tmp_path / "good", max_train_steps=2)
    trainer = toy.trainer(tmp_path / "bad", loss=broken(what, at_step=2), checkpointing_steps=2)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit()
    assert moved(good) > 0.05
    assert torch.equal(toy.weights(trainer.policy), good)
    assert torch.equal(toy.saved(tmp_path / "bad" / "checkpoint-2"), good)
    report = tmp_path / "bad" / "nonfinite-step-2-rank-0.json"
    content = json.loads(report.read_text())
    indices = trainer.sampler.indices(8, 4)
    assert content["step"] == 2
    assert [row["index"] for row in content["pairs"]] == indices
    losses = [row["loss"] for row in content["pairs"]]
    assert [loss == "nan" for loss in losses] == [what == "loss" and i % 2 == 1 for i in range(4)]
    named = f"loss of pairs [{indices[1]}, {indices[3]}]" if what == "loss" else "gradient"
    assert str(caught.value).startswith(f"Step 2: the {named} is not finite. No step was taken; ")
    assert str(report) in str(caught.value)


def test_checkpoints_come_every_so_often_and_at_the_end(tmp_path):
    run(tmp_path, max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 5)]


def test_on_step_sees_every_step_and_the_unwrapped_network(tmp_path):
    seen = []
    trainer = toy.trainer(tmp_path, max_train_steps=3, on_step=lambda network, step: seen.append((network, step)))
    trainer.fit()
    assert seen == [(trainer.policy, 1), (trainer.policy, 2), (trainer.policy, 3)]


def test_latest_without_a_checkpoint_starts_afresh(tmp_path):
    assert torch.equal(run(tmp_path / "a", resume_from_checkpoint="latest"), run(tmp_path / "b"))


def test_a_fresh_run_in_a_used_folder_is_not_mixed_with_the_earlier_one(tmp_path):
    run(tmp_path, checkpointing_steps=3, checkpoints_total_limit=None)
    with pytest.raises(Died):
        run(tmp_path, on_step=die_after(2), learning_rate=0.1, checkpointing_steps=4)
    fresh = run(tmp_path, learning_rate=0.1, resume_from_checkpoint="latest", checkpointing_steps=4)
    assert torch.equal(fresh, run(tmp_path / "elsewhere", learning_rate=0.1))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_optimizer_state_without_names_is_refused(tmp_path):
    run(tmp_path, max_train_steps=3)
    file = tmp_path / "checkpoint-3" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    torch.save({"optimizer": {"state": dict(enumerate(state["optimizer"].values())), "param_groups": []}}, file)
    sealing.seal(file.parent, step=3)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 keeps its optimizer state by number"):
        run(tmp_path, resume_from_checkpoint="latest")


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(tmp_path):
    straight = run(tmp_path / "straight")
    run(tmp_path / "damaged", checkpointing_steps=3)
    file = tmp_path / "damaged" / "checkpoint-6" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    trainer = toy.trainer(tmp_path / "damaged", resume_from_checkpoint="latest")
    trainer.fit()
    said = trainer.console.file.getvalue()
    assert "checkpoint-6 is damaged: optimizer.pt is not what was written, by its SHA-256. It is now called" in said
    assert f"Resuming from {tmp_path / 'damaged' / 'checkpoint-3'} at step 3." in said.replace("\n", "")
    assert torch.equal(toy.weights(trainer.policy), straight)
    assert toy.trajectory(tmp_path / "damaged") == toy.trajectory(tmp_path / "straight")


def test_dropout_is_a_function_of_seed_and_step(tmp_path, monkeypatch):
    plain = toy.policy
    monkeypatch.setattr(toy, "policy", lambda: torch.nn.Sequential(torch.nn.Dropout(0.5), plain()))
    straight = run(tmp_path / "straight")
    run(tmp_path / "halves", max_train_steps=3)
    torch.manual_seed(1)  # as a new process has another state
    assert torch.equal(run(tmp_path / "halves", resume_from_checkpoint="latest"), straight)
    assert not torch.equal(run(tmp_path / "other", seed=1), straight)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    finished = run(tmp_path)
    trainer = toy.trainer(tmp_path, resume_from_checkpoint="latest")
    assert trainer.fit()["step"] == 6
    assert torch.equal(toy.weights(trainer.policy), finished)


def test_a_checkpoint_beyond_the_end_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 has done 6 steps already, more than .* 4\. Raise that"):
        run(tmp_path, max_train_steps=4, resume_from_checkpoint="latest")


def test_a_run_of_another_identity_is_not_resumed(tmp_path):
    run(tmp_path, max_train_steps=2, identity={"objective": {"beta": 1.0}})
    with pytest.raises(CheckpointError, match=r"objective\.beta: 1\.0 there, 2\.0 now"):
        run(tmp_path, resume_from_checkpoint="latest", identity={"objective": {"beta": 2.0}})


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, name):
    number = getattr(signal, name)
    common = {"checkpointing_steps": 4, "logging_steps": 2, "use_ema": True}
    straight = run(tmp_path / "straight", **common)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "told", loss=toy.told_to_stop(2, number), **common)
    assert caught.value.exit_code == 128 + number
    assert str(caught.value) == (
        f"Stopped after step 3 of 6, which is saved in {tmp_path / 'told' / 'checkpoint-3'}. The same command with "
        "--resume latest goes on."
    )
    assert [line["step"] for line in toy.trajectory(tmp_path / "told")] == [2]
    assert torch.equal(run(tmp_path / "told", resume_from_checkpoint="latest", **common), straight)
    assert toy.trajectory(tmp_path / "told") == toy.trajectory(tmp_path / "straight")  # means over 3 and 4 too


@pytest.mark.usefixtures("listening")
def test_the_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "SAME", 0.0)
    seen = []

    def impatient(network, indices, step):
        seen.append(step)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, loss=impatient)
    assert seen == [0]
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.usefixtures("listening")
def test_a_ctrl_c_that_a_launcher_passes_on_is_no_second_one(tmp_path):
    def twice(network, indices, step):
        for _ in range(2 if step == 1 else 0):
            signal.raise_signal(signal.SIGINT)
        return toy.loss(network, indices, step)

    with pytest.raises(Interrupted, match="Stopped after step 2 of 6"):
        run(tmp_path, loss=twice)


def test_two_processes_equal_one_when_one_of_them_is_told_to_stop(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, "-m", "tests.training.toy", str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two" / "checkpoint-3").is_dir()  # where both stopped, and went on
    one = run(tmp_path / "one", micro=2, accumulate=2, logging_steps=2)
    assert moved(one) > 0.05
    torch.testing.assert_close(toy.saved(tmp_path / "two" / "checkpoint-6"), one, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(toy.trajectory(tmp_path / "two"), toy.trajectory(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
