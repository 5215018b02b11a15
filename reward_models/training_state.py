"""Stop and go on: what a training run has to know besides its pairs and its recipe."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_models.errors import ScorerError
from reward_models.pairs import RewardPair
from reward_models.training_recipes import RewardRecipe

STATE_FILE = "training-state.pt"  # before 2026-12; now each step has its own
KEPT = 2  # states: should the last one turn out damaged, there is one before it
FREE = ("eval_every", "num_workers", "micro_batch_size")  # of a recipe: may differ when a run goes on


@dataclass
class TrainingResult:
    """Tell how a training run went."""

    best_step: int = 0
    best_accuracy: float | None = None  # on the validation pairs; None without any
    history: list[dict[str, float]] = field(default_factory=list)  # one record a step
    accuracy_at: dict[int, float] = field(default_factory=dict)  # by timestep, of the best step; step-aware ones only


class TrainingStopped(Exception):
    """Report that training was asked to stop, after a step whose state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


def save_state(
    directory: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    result: TrainingResult,
    agreed: str,
) -> None:
    """Write what `load_state` reads, whole or not at all, then drop the state before the last one.

    Each state has a file named after its step, and beside it one with its SHA-256, written when it is on the disk.
    `agreed` is what a later run must have in common.
    """
    content = {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "result": json.dumps(asdict(result)),
        "agreed": agreed,
    }
    file = directory / f"training-state-{step}.pt"
    _into_place(file, lambda scratch: torch.save(content, scratch))
    digest = _digest(file)
    _into_place(_proof(file), lambda scratch: scratch.write_text(digest, encoding="ascii"))
    kept = [state for state in states(directory) if _step_of(state) <= step][-KEPT:]
    _drop(state for state in states(directory) if state not in kept)


def states(directory: Path) -> list[Path]:
    """Return the files of states in a folder, that of the last step last."""
    found = [file for file in directory.glob("training-state-*.pt") if re.fullmatch(r"training-state-\d+", file.stem)]
    return sorted(found, key=_step_of)


def _step_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def forget_states(directory: Path) -> None:
    """Delete the states in a folder."""
    _drop([*states(directory), directory / STATE_FILE])


def _drop(files: Iterable[Path]) -> None:
    for file in files:
        _proof(file).unlink(missing_ok=True)  # first: what is without it does not count
        file.unlink(missing_ok=True)


def is_resumable(directory: Path) -> bool:
    """Tell whether a folder holds a state, whole or not."""
    return bool(states(directory)) or (directory / STATE_FILE).is_file()


def _into_place(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, force it to the disk, and move it there."""
    scratch = file.with_name(f"{file.name}.part")
    write(scratch)
    with scratch.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(scratch, file)


def _proof(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _whole(directory: Path, say: Callable[[str], Any]) -> Path:
    """Return the last state that is what was written; damaged ones after it are told of."""
    found = states(directory)
    for file in reversed(found):
        proof = _proof(file)
        if proof.is_file() and proof.read_bytes() == _digest(file).encode():
            return file
        say(f"Warning: {file} is damaged or incomplete, and is not used.")
    if not found and (directory / STATE_FILE).is_file():  # written before 2026-12
        return directory / STATE_FILE
    what = f"no state in {directory} is whole" if found else f"there is none in {directory}"
    raise ScorerError(f"There is nothing to resume: {what}. Start without resuming.")


def load_state(
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    agreed: str,
    say: Callable[[str], Any] = lambda message: None,
) -> tuple[int, dict[str, Tensor], TrainingResult]:
    """Put weights and optimizer back; return the steps done, the best weights and the result so far.

    say: is told of states that are damaged, where an earlier one is taken.

    Raises:
        ScorerError: there is no whole state, or it is of another recipe or other pairs.
    """
    file = _whole(directory, say)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ScorerError(f"{file} is damaged ({str(error).splitlines()[0]}). Start without resuming.") from None
    if content["agreed"] != agreed:
        before, now = json.loads(content["agreed"]), json.loads(agreed)
        changed = [f"{key}: {before.get(key)} then, {now.get(key)} now" for key in now if before.get(key) != now[key]]
        raise ScorerError(f"The run in {directory} differs ({'; '.join(changed)}). Undo that, or use another folder.")
    module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    saved = json.loads(content["result"])
    saved["accuracy_at"] = {int(key): value for key, value in saved["accuracy_at"].items()}
    return content["step"], content["best"], TrainingResult(**saved)


def agreement(recipe: RewardRecipe, train: list[RewardPair], held_out: list[RewardPair]) -> str:
    """Return as JSON what two halves of one run must have in common: recipe, and prompts and labels in order."""
    fixed = {key: value for key, value in asdict(recipe).items() if key not in FREE}
    digest = hashlib.blake2b(digest_size=16)
    for pair in [*train, *held_out]:
        digest.update(f"{pair.prompt}\0{pair.label_0}\0{pair.user}\0".encode())
    return json.dumps({**fixed, "pairs": digest.hexdigest()}, sort_keys=True)
