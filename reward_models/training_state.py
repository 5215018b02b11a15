"""Stop and go on: what a training run has to know besides its pairs and its recipe."""

import hashlib
import json
import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_models.errors import ScorerError
from reward_models.pairs import RewardPair
from reward_models.training_recipes import RewardRecipe

STATE_FILE = "training-state.pt"
FREE = ("eval_every", "num_workers", "micro_batch_size")  # of a recipe: may differ when a run goes on


@dataclass
class TrainingResult:
    """Tell how a training run went."""

    best_step: int = 0
    best_accuracy: float | None = None  # on the validation pairs; None without any
    history: list[dict[str, float]] = field(default_factory=list)  # one record a step
    accuracy_at: dict[int, float] = field(default_factory=dict)  # by timestep, of the best step; step-aware ones only


def save_state(
    directory: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    result: TrainingResult,
    agreed: str,
) -> None:
    """Write what `load_state` reads, whole or not at all; `agreed` is what a later run must have in common."""
    content = {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "result": json.dumps(asdict(result)),
        "agreed": agreed,
    }
    scratch = directory / f"{STATE_FILE}.part"
    torch.save(content, scratch)
    os.replace(scratch, directory / STATE_FILE)


def load_state(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, agreed: str
) -> tuple[int, dict[str, Tensor], TrainingResult]:
    """Put weights and optimizer back; return the steps done, the best weights and the result so far.

    Raises:
        ScorerError: there is no state, or it is of another recipe or other pairs.
    """
    file = directory / STATE_FILE
    if not file.is_file():
        raise ScorerError(f"There is nothing to resume in {directory}: no {STATE_FILE}. Start without resuming.")
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
