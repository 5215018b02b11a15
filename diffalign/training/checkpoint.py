"""Checkpoints: complete or not there at all, limited in number, refused by a run they do not belong to."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.training import sharding

STATE = "state.json"
WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
REPLACED = "replaced-"


class CheckpointError(UserError):
    """Report a checkpoint that cannot be written, read or resumed from."""


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


def folders(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def find(output_dir: Path, wanted: str) -> Path | None:
    """Return the checkpoint named by `resume_from_checkpoint`; None if "latest" finds none, for a fresh start.

    Raises:
        CheckpointError: the folder that was named does not exist.
    """
    if wanted == "latest":
        existing = folders(output_dir)
        return existing[-1] if existing else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / STATE).is_file():
            return path
    names = ", ".join(path.name for path in folders(output_dir)) or "none"
    raise CheckpointError(f'There is no checkpoint "{wanted}". Checkpoints in {output_dir}: {names}.')


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
    partial = output_dir / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights_file.write(partial, parameters, step)
        torch.save(optimizer_state, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps({"step": step, "identity": identity}, indent=1), encoding="utf8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # three libraries, three ways to report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        usable = folders(output_dir)
        left = (
            f"{usable[-1]} is intact: free some space and continue with --resume latest"
            if usable
            else "there is no earlier one"
        )
        reason = getattr(error, "strerror", None) or f"{error} (is the disk full?)"
        raise CheckpointError(f"Cannot write {final}: {reason}. {left}.") from error
    for path in [*_superseded(output_dir, step, limit), *output_dir.glob(f"{REPLACED}checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def set_aside(output_dir: Path) -> list[str]:
    """Rename the checkpoints of an earlier run, so that a fresh one is never continued from them; return what to say.

    They are deleted when the fresh run has written its own first one.

    Raises:
        CheckpointError: the folder may not be written.
    """
    earlier = folders(output_dir)
    try:
        for path in earlier:
            target = path.with_name(REPLACED + path.name)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
    except OSError as error:
        raise CheckpointError(f"Cannot rename {path}: {error.strerror}. Name another train.output_dir.") from error
    if not earlier:
        return []
    return [
        f"{output_dir} held {', '.join(path.name for path in earlier)} of an earlier run. They are now called "
        f"{REPLACED}checkpoint-* and go when this run writes its first checkpoint. To continue that run instead: stop, "
        "name them as before, and add --resume latest."
    ]


def _superseded(output_dir: Path, step: int, limit: int | None) -> list[Path]:
    """List the checkpoints beyond the limit: those of later steps, left here by another run, go before the oldest."""
    existing = folders(output_dir)
    later = [path for path in existing if _step_of(path) > step]
    return [*later, *(path for path in existing if path not in later)][:-limit] if limit else []


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
            f"{path} is damaged: {name} cannot be read ({type(error).__name__}). Delete the folder and resume from an "
            "earlier one."
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
