"""`diffalign reward train` and `diffalign reward convert`: reward models of one's own."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import reward_models
from diffalign.data import open_pairs
from diffalign.errors import DataError, UserError
from diffalign.jobs.devices import pick_device
from reward_models import training
from reward_models.two_tower import TwoTowerScorer

RECIPES = {"pickscore": training.PICKSCORE, "hpsv2": training.HPSV2}


def train(
    name: str,
    data: str,
    out: Path,
    *,
    init: str | None,
    recipe: str | None,
    changes: dict[str, Any],
    validation: str | None,
    device: str,
    console: Console,
) -> training.TrainingResult:
    """Fine-tune a scorer on preference pairs; the best weights by validation end in `out`, with a log and the recipe.

    Args:
        name: a scorer with two towers: pickscore, hpsv2, hpsv2.1.
        init: weights to start from, None for the published ones.
        recipe: "pickscore" or "hpsv2"; None takes the one of the scorer's family.
        changes: fields of the recipe that differ from the published ones.

    Raises:
        UserError: a scorer that cannot be trained here, or an unknown recipe.
    """
    chosen = recipe or ("hpsv2" if name.startswith("hpsv2") else "pickscore")
    if chosen not in RECIPES:
        raise UserError(f'Unknown recipe "{chosen}". Available: {", ".join(RECIPES)}.')
    wanted = replace(RECIPES[chosen], **changes)
    pairs = _pairs(data)
    held_out = _pairs(validation) if validation else None
    scorer = reward_models.load(name, init, pick_device(device))
    if not isinstance(scorer, TwoTowerScorer):
        raise UserError(
            f'"{name}" cannot be trained by this command: it has no two CLIP towers. Use pickscore or hpsv2.'
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(asdict(wanted), indent=1), encoding="utf8")
    columns = (TextColumn("training {task.fields[note]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar, (out / "history.jsonl").open("w", encoding="utf8") as history:
        task = bar.add_task("training", total=wanted.max_steps, note="")

        def log(record: dict[str, float]) -> None:
            history.write(json.dumps(record) + "\n")
            bar.update(task, advance=1, note=f"loss {record.get('loss', float('nan')):.3f}")

        result = training.train_reward(scorer, pairs, wanted, validation=held_out, directory=out, log=log)
    if result.best_accuracy is None:
        scorer.save(out)  # without validation the last weights are the result
    told = (
        "not validated" if result.best_accuracy is None else f"agrees on {result.best_accuracy:.1%} of held-out pairs"
    )
    console.print(
        f"{name}: {told} (step {result.best_step}). Use it: --with {name}={out}", markup=False, highlight=False
    )
    return result


def _pairs(source: str) -> list[tuple[Any, ...]]:
    """Return (chosen, rejected, prompt, 1.0) of every readable pair; ties are dropped by the reader."""
    found = open_pairs(source)
    if found.images_per_example != 2:
        raise DataError(f"{source} holds lists or single images; a reward model learns from pairs.")
    return [
        (row.chosen.load(), row.rejected.load(), row.prompt, 1.0 if row.preference is None else row.preference)
        for row in found
    ]
