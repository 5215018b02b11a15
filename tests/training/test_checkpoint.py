import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffalign.training import checkpoint, checkpoints, sealing
from diffalign.training.checkpoint import CheckpointError
from diffalign.training.sealing import MANIFEST

IDENTITY = {"objective": {"name": "dpo", "beta": 2000.0}, "train": {"seed": 0}, "data": {"columns": ("jpg_0", "jpg_1")}}


def parameters(value: float, size: int = 3) -> dict[str, nn.Parameter]:
    return {
        "layer.weight": nn.Parameter(torch.full((size, 2), value)),
        "bias": nn.Parameter(torch.full((size,), value)),
    }


def save(directory: Path, step: int, limit: int | None = None, identity=None, size: int = 3) -> Path:
    state = {"optimizer": {"exp_avg": torch.full((size,), float(step))}}
    return checkpoint.save(directory, step, parameters(float(step), size), state, identity or IDENTITY, limit)


def values(path: Path, identity=None) -> tuple[int, float, float]:
    """Return the step, the weight and the optimizer's state that a checkpoint restores."""
    restored = parameters(-1.0)
    step, state = checkpoint.load(path, restored, identity or IDENTITY)
    (weight,) = {value for tensor in restored.values() for value in tensor.detach().flatten().tolist()}
    return step, weight, state["optimizer"]["exp_avg"][0].item()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    assert values(save(tmp_path, 7)) == (7, 7.0, 7.0)
    assert names(tmp_path) == ["checkpoint-7"]


def test_the_oldest_are_dropped_by_number_and_not_by_name(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, limit=3)
    assert [path.name for path in checkpoints.folders(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]


def test_without_a_limit_all_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    assert len(checkpoints.folders(tmp_path)) == 5


def test_leftovers_of_a_longer_run_do_not_push_out_the_new_checkpoint(tmp_path):
    for step in (1000, 1500):
        save(tmp_path, step, limit=2)
    assert values(save(tmp_path, 100, limit=2)) == (100, 100.0, 100.0)
    save(tmp_path, 200, limit=2)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-200"]


def test_an_earlier_run_is_set_aside_and_goes_with_the_first_new_checkpoint(tmp_path):
    assert checkpoints.set_aside(tmp_path) == []
    for step in (10, 20):
        save(tmp_path, step)
    (said,) = checkpoints.set_aside(tmp_path)
    assert "held checkpoint-10, checkpoint-20 of an earlier run" in said
    assert names(tmp_path) == ["replaced-checkpoint-10", "replaced-checkpoint-20"]
    assert checkpoints.find(tmp_path, "latest") is None  # a run that dies now is not continued from another
    assert values(tmp_path / "replaced-checkpoint-20") == (20, 20.0, 20.0)
    save(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint-5"]


def test_latest_is_the_one_with_most_steps(tmp_path):
    assert checkpoints.find(tmp_path, "latest") is None
    assert checkpoints.find(tmp_path / "absent", "latest") is None
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-10"


def test_a_checkpoint_is_found_by_name_and_by_path(tmp_path):
    path = save(tmp_path, 4)
    assert checkpoints.find(tmp_path, "checkpoint-4") == path
    assert checkpoints.find(tmp_path / "elsewhere", str(path)) == path


def test_a_missing_checkpoint_names_those_there_are(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r'no checkpoint "checkpoint-5"\. Checkpoints in .*: checkpoint-4\.$'):
        checkpoints.find(tmp_path, "checkpoint-5")
    with pytest.raises(CheckpointError, match=r": none\.$"):
        checkpoints.find(tmp_path / "empty", "checkpoint-5")


def test_a_save_that_was_killed_leaves_nothing_that_counts(tmp_path):
    save(tmp_path, 3)
    partial = tmp_path / ".checkpoint-6.partial"
    partial.mkdir()
    (partial / checkpoint.WEIGHTS).write_bytes(b"half")
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-3"
    assert values(save(tmp_path, 6)) == (6, 6.0, 6.0)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_a_checkpoint_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    seen = []

    def look(source, target):
        if Path(source).is_dir():
            seen.append((sorted(p.name for p in Path(source).iterdir()), Path(target).exists()))
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", look)
    save(tmp_path, 2)
    assert seen == [(["manifest.json", "optimizer.pt", "state.json", "trainable.safetensors"], False)]


def full_disk(kind):
    """Return a function that writes half a file and then fails the way `kind` does on a full disk."""
    error = {
        "save_file": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "torch.save": RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),
        "os.replace": OSError(errno.ENOSPC, "No space left on device"),
    }[kind]

    def fail(_, path, **_options):
        if Path(path).parent.name.endswith(".partial"):
            Path(path).write_bytes(b"half")
        raise error

    return fail


@pytest.mark.parametrize("kind", ["save_file", "torch.save", "os.replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint_usable(tmp_path, monkeypatch, kind):
    save(tmp_path, 3, limit=1)
    module, _, name = f"checkpoint.{kind}".rpartition(".")
    target = {"checkpoint": checkpoint, "checkpoint.torch": torch, "checkpoint.os": os}[module]
    monkeypatch.setattr(target, name, full_disk(kind))
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 6, limit=1)
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(f"Cannot write {tmp_path / 'checkpoint-6'}: ")
    assert f"{tmp_path / 'checkpoint-3'} is intact: free some space and continue with --resume latest" in message
    assert "space left" in message or "disk full" in message
    assert names(tmp_path) == ["checkpoint-3"]
    assert values(checkpoints.find(tmp_path, "latest")) == (3, 3.0, 3.0)


@pytest.mark.parametrize("size", [5000, 400])
def test_the_errors_of_the_libraries_themselves_are_understood(tmp_path, size):
    # A limit on the size of files fails in the writing code as a full disk does; small weights pass, torch.save fails.
    save(tmp_path, 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 + 12 * size * (size < 1000), before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-3 is intact"):
            checkpoint.save(tmp_path, 6, parameters(1.0, size), {"optimizer": torch.zeros(10_000)}, IDENTITY, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_full_disk_before_the_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", full_disk("save_file"))
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        save(tmp_path, 3)
    assert names(tmp_path) == []


def damage(file: Path, kind: str) -> None:
    """Damage a file of a checkpoint: its end, one bit in its middle, all of it, or what it says."""
    content = bytearray(file.read_bytes())
    if kind == "a flipped bit":
        content[len(content) // 2] ^= 1
    changed = {"truncated": content[:-3], "other content": b"{}", "empty": b"", "a flipped bit": bytes(content)}
    file.unlink() if kind == "missing" else file.write_bytes(changed[kind])


KINDS = ("truncated", "missing", "other content", "empty", "a flipped bit")


@pytest.mark.parametrize("file", [checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.OPTIMIZER, MANIFEST])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_set_aside_and_the_last_whole_one_used(tmp_path, file, kind):
    for step in (2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-3" / file, kind)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is damaged: .*\. Resume from an earlier one; --resume"):
        checkpoints.verify(tmp_path, "checkpoint-3")  # by name it is an error
    (said,) = checkpoints.verify(tmp_path, "latest")
    assert said.startswith(f"Warning: {tmp_path / 'checkpoint-3'} is damaged: ")
    assert said.endswith("It is now called damaged-checkpoint-3, and is not used.")
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-3"]
    assert values(checkpoints.find(tmp_path, "latest")) == (2, 2.0, 2.0)
    assert checkpoints.verify(tmp_path, "latest") == []


def test_an_edited_step_is_noticed_even_with_a_manifest_that_was_edited_along(tmp_path):
    path = save(tmp_path, 3)
    file = path / checkpoint.STATE
    file.write_text(file.read_text().replace('"step": 3', '"step": 1'))  # of the same size
    assert checkpoints.fault(path) == "state.json is not what was written, by its SHA-256"
    sealing.seal(path, step=1)
    assert checkpoints.fault(path) == "it has done 1 steps"


def test_an_empty_folder_is_passed_over_and_sizes_are_enough_to_find_it(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoints.find(tmp_path, "latest") == tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match=r"checkpoint-9 is damaged: state\.json cannot be read"):
        checkpoints.find(tmp_path, "checkpoint-9")


def test_where_no_checkpoint_is_whole_nothing_is_renamed_and_nothing_starts_afresh(tmp_path):
    for step in (2, 3):
        damage(save(tmp_path, step) / checkpoint.OPTIMIZER, "a flipped bit")
    damage(tmp_path / "checkpoint-2" / checkpoint.WEIGHTS, "empty")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint that is whole:\n  checkpoint-3: optimizer.pt is not what"
    ):
        checkpoints.verify(tmp_path, "latest")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_two_damaged_ones_of_the_same_step_are_both_kept(tmp_path):
    save(tmp_path, 2)
    for _ in range(2):
        damage(save(tmp_path, 3) / checkpoint.OPTIMIZER, "empty")
        checkpoints.verify(tmp_path, "latest")
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-3", "damaged-checkpoint-3-2"]


def test_damaged_ones_do_not_push_out_the_last_whole_one(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    for step in (4, 6):
        damage(tmp_path / f"checkpoint-{step}" / checkpoint.OPTIMIZER, "empty")
    save(tmp_path, 8, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_checkpoint_written_again_takes_the_place_of_the_earlier_one_in_two_renames(tmp_path, monkeypatch):
    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint.os, "replace", lambda source, target: _die_at_folders(source, target))
    with pytest.raises(Killed):
        save(tmp_path, 3)
    assert names(tmp_path) == [".checkpoint-3.partial", "replaced-checkpoint-3"]
    assert checkpoints.fault(tmp_path / ".checkpoint-3.partial") is None  # both are whole
    assert checkpoints.fault(tmp_path / "replaced-checkpoint-3") is None
    monkeypatch.undo()
    assert values(save(tmp_path, 3)) == (3, 3.0, 3.0)
    assert names(tmp_path) == ["checkpoint-3"]


class Killed(BaseException):
    pass


def _die_at_folders(source, target):
    if Path(source).is_dir():
        raise Killed
    os.rename(source, target)


def test_a_checkpoint_from_before_manifests_is_read(tmp_path):
    path = save(tmp_path, 3)
    (path / MANIFEST).unlink()
    state = json.loads((path / checkpoint.STATE).read_text())
    del state["manifest"]
    (path / checkpoint.STATE).write_text(json.dumps(state))
    assert checkpoints.verify(tmp_path, "latest") == []
    assert values(checkpoints.find(tmp_path, "latest")) == (3, 3.0, 3.0)
    damage(path / checkpoint.OPTIMIZER, "truncated")
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is damaged: optimizer.pt cannot be read"):
        values(path)


def test_another_run_is_refused_with_what_differs(tmp_path):
    path = save(tmp_path, 3)
    other = {"objective": {"name": "dpo", "beta": 500.0}, "train": {"seed": 0}, "model": "abc"}
    with pytest.raises(CheckpointError) as caught:
        values(path, other)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} belongs to a different run:"
    assert lines[1:4] == [
        "  data.columns: ['jpg_0', 'jpg_1'] there, None now",
        "  model: None there, 'abc' now",
        "  objective.beta: 2000.0 there, 500.0 now",
    ]
    assert "train.output_dir" in lines[4]


def test_an_identity_survives_json(tmp_path):
    path = save(tmp_path, 3)
    assert json.loads((path / checkpoint.STATE).read_text())["identity"]["data"] == {"columns": ["jpg_0", "jpg_1"]}
    assert values(path)[0] == 3


def test_other_weights_are_refused_and_nothing_is_overwritten(tmp_path):
    path = save(tmp_path, 3)
    other = {"layer.weight": nn.Parameter(torch.zeros(3, 2)), "scale": nn.Parameter(torch.zeros(3))}
    with pytest.raises(CheckpointError, match='"bias" is only in one of them'):
        checkpoint.load(path, other, IDENTITY)
    assert other["layer.weight"].abs().sum() == 0


FORM = checkpoint.WeightsFile("lora.safetensors", {"layer.weight": "unet.layer", "bias": "unet.bias"}, {"r": "4"})


def test_weights_may_lie_as_others_read_them(tmp_path):
    trained = parameters(1 / 3)
    path = checkpoint.save(tmp_path, 2, trained, {}, IDENTITY, None, FORM)
    assert names(path) == ["lora.safetensors", "manifest.json", "optimizer.pt", "state.json"]  # once, not twice
    with safe_open(path / "lora.safetensors", "pt") as file:
        assert set(file.keys()) == {"unet.layer", "unet.bias"}
        assert file.metadata() == {"r": "4", "training_steps": "2"}
    restored = parameters(0.0)
    checkpoint.load(path, restored, IDENTITY, FORM)
    assert all(torch.equal(restored[name], value) for name, value in trained.items())
    (path / "lora.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged: lora\.safetensors cannot be read"):
        checkpoint.load(path, restored, IDENTITY, FORM)


def test_weights_of_before_are_still_read(tmp_path):
    restored = parameters(0.0)
    assert checkpoint.load(save(tmp_path, 7), restored, IDENTITY, FORM)[0] == 7
    assert {value for p in restored.values() for value in p.detach().flatten().tolist()} == {7.0}
