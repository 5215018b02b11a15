"""Checkpoints: proved whole before they are used, limited in number, refused by a run they do not belong to."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.training import checkpoints, sealing, sharding
from diffalign.training.checkpoints import STATE, CheckpointError

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class WeightsFile:
    """Say how the trained weights lie in a checkpoint, so that other programs can load them from there.

    Args:
        name: of the file.
        keys: names of its tensors by the names of the parameters; None: the same.
        metadata: of the file; training_steps is added.
    """

    name: str = WEIGHTS
    keys: Mapping[str, str] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, parameters: Mapping[str, Tensor], step: int) -> None:
        """Write the weights as they are, bit for bit."""
        keys = self.keys or {name: name for name in parameters}
        tensors = {keys[name]: value.detach().cpu().contiguous() for name, value in parameters.items()}
        save_file(tensors, folder / self.name, metadata={**self.metadata, "training_steps": str(step)})

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights by the names of the parameters. Checkpoints before 2026-12 have WEIGHTS instead."""
        if not (folder / self.name).exists() and (folder / WEIGHTS).exists():
            return _read(folder, WEIGHTS, load_file)
        names = {key: name for name, key in (self.keys or {}).items()}
        return {names.get(key, key): tensor for key, tensor in _read(folder, self.name, load_file).items()}


def save(
    output_dir: Path,
    step: int,
    parameters: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    identity: dict[str, Any],
    limit: int | None,
    weights_file: WeightsFile = WeightsFile(),
) -> Path:
    """Write `checkpoint-<step>` beside its final place, move it there when complete, then drop the oldest ones.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full; earlier ones stay as they are.
    """
    final = output_dir / f"checkpoint-{step}"
    partial, before = checkpoints.hidden(final, checkpoints.PARTIAL), final.with_name(checkpoints.REPLACED + final.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights_file.write(partial, parameters, step)
        torch.save(optimizer_state, partial / OPTIMIZER)
        state = {"step": step, "manifest": sealing.MANIFEST, "identity": identity}
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf8")
        sealing.seal(partial, step=step)
        if final.exists():  # a folder cannot be renamed over another one
            checkpoints.delete(before)
            final.rename(before)
        os.replace(partial, final)
        sealing.sync(output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # three libraries, three ways to report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        if before.exists() and not final.exists():
            before.rename(final)
        raise _unwritten(final, error) from error
    checkpoints.clear(output_dir, step, limit)
    return final


def _unwritten(final: Path, error: Exception) -> CheckpointError:
    usable = [path for path in checkpoints.folders(final.parent) if checkpoints.fault(path, thorough=False) is None]
    left = (
        f"{usable[-1]} is intact: free some space and continue with --resume latest"
        if usable
        else "there is no earlier one"
    )
    reason = getattr(error, "strerror", None) or f"{error} (is the disk full?)"
    return CheckpointError(f"Cannot write {final}: {reason}. {left}.")


def load(
    path: Path,
    parameters: dict[str, nn.Parameter],
    identity: dict[str, Any],
    weights_file: WeightsFile = WeightsFile(),
) -> tuple[int, dict[str, Any]]:
    """Restore the weights in place; return the number of finished steps and the optimizer's state.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to a run with other settings, data or model.
    """
    step, saved = _state(path)
    tensors = weights_file.read(path)
    optimizer_state = _read(path, OPTIMIZER, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    _require_same(path, saved, identity)
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise CheckpointError(f'{path} holds other weights than this run trains: "{odd}" is only in one of them.')
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sharding.cut(tensors[name], parameter))
    return step, optimizer_state


def check(path: Path, settings: dict[str, Any], max_train_steps: int) -> None:
    """Refuse a checkpoint for what can be told without its weights or those of the model.

    settings: the part of a run's identity that is known.

    Raises:
        CheckpointError: as `load` raises it, or it has done more steps than the run is to do.
    """
    step, saved = _state(path)
    known = _flat(json.loads(json.dumps(settings)))
    _require_same(path, {key: value for key, value in _flat(saved).items() if key in known}, settings)
    require_steps_left(path, step, max_train_steps)


def require_steps_left(path: Path, step: int, max_train_steps: int) -> None:
    """Raise CheckpointError if the checkpoint of `step` is beyond the end of the run."""
    if step > max_train_steps:
        raise CheckpointError(
            f"{path} has done {step} steps already, more than train.max_train_steps {max_train_steps}. "
            "Raise that, or name an earlier checkpoint."
        )


def _state(path: Path) -> tuple[int, dict[str, Any]]:
    return _read(path, STATE, lambda file: _step_and_identity(json.loads(file.read_text(encoding="utf8"))))


def steps_of(path: Path) -> int:
    """Return how many steps the checkpoint at `path` has done."""
    return _state(path)[0]


def averages(path: Path) -> list[Tensor]:
    """Return the moving averages of the trained weights, in the order of the network's parameters."""
    return _read(path, OPTIMIZER, lambda file: torch.load(file, map_location="cpu", weights_only=True, mmap=True))[
        "ema"
    ]["shadow_params"]


def _read(path: Path, name: str, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path / name)
    except Exception as error:  # what a broken file raises depends on the library and on where it is broken
        raise CheckpointError(
            f"{path} is damaged: {name} cannot be read ({type(error).__name__}). Resume from an earlier one."
        ) from error


def _step_and_identity(state: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    identity = state["identity"]
    identity.get("lora", {}).pop("export_kohya", None)  # compared before 2026-12, though no weight depends on it
    identity.get("inversion", {}).pop("batch_size", None)
    return state["step"], identity


def _require_same(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run under other conditions, naming each that differs."""
    saved, current = _flat(saved), _flat(json.loads(json.dumps(current)))
    keys = sorted(saved.keys() | current.keys())
    differing = [key for key in keys if saved.get(key) != current.get(key)]
    if differing:
        lines = [f"  {key}: {saved.get(key)!r} there, {current.get(key)!r} now" for key in differing[:8]]
        raise CheckpointError(
            f"{path} belongs to a different run:\n" + "\n".join(lines) + "\nUse the settings, data and model it was "
            "started with, or start afresh in another train.output_dir."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
