"""Which runs the comparison of methods consists of: short trials of a written search space, then several seeds.

A trial is the recipe at a third of its length, warm-up included, judged on prompts that no table shows. Every method
gets as many trials as every other, and of those that learn from data all trials see as many images.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import method_runs
from diffalign.errors import ConfigError, suggestion
from diffalign.yaml_text import parse_yaml

SPACES = Path(__file__).with_name("search_spaces.yaml")
TRIALS = 6
TRIAL_SHARE = 1 / 3  # of a run's length
TRIAL_SEED = 100  # of training; the seeds that are compared start at 0

Settings = dict[str, Any]


@dataclass(frozen=True)
class EmbeddedModel:
    """Say what is compared on, the recipes' folder, the results' name, and the length of runs that learn from data."""

    base: str  # of assets/
    recipes: str
    results: str
    steps: int  # of 16 pairs, or as many images
    title: str


MODELS = {
    "sdxl": EmbeddedModel("tiny-sdxl", "tiny", "methods", 200, "Every method on the embedded SDXL"),
    "sd3": EmbeddedModel("tiny-sd3", "tiny-sd3", "flow-methods", 250, "Every method on the embedded flow model"),
}


@dataclass(frozen=True)
class Run:
    """Name one run: of which method and kind, in which folder, and what it sets differently from its recipe."""

    method: str
    kind: str  # trial or seed
    recipe: str
    folder: Path
    shared: Path
    changes: tuple[str, ...]
    settings: Settings = field(default_factory=dict)  # those of the search space
    tuning: bool = False

    def read(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the row there is, and what is not as it was when it was made."""
        return method_runs.read_row(self.recipe, self.folder, self.changes, tuning=self.tuning, shared=self.shared)

    def perform(self, threads: int | None = None) -> dict[str, Any]:
        """Return the row of the run, made now unless there is one."""
        return method_runs.attempt(
            self.recipe, self.folder, self.changes, tuning=self.tuning, shared=self.shared, threads=threads
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """Say what is asked for.

    Args:
        model: of MODELS.
        output: the folder of all runs.
        seeds: runs of each method that are compared.
        steps: of methods that learn from data; None: the model's own. Online ones take their recipe's.
        trials: of each method, the first of its search space.
        tuned: False: no trials, every method has its recipe's own settings.
        processes: runs at a time, with one thread each if there are several.
    """

    model: str
    output: Path
    seeds: int = 3
    steps: int | None = None
    trials: int = TRIALS
    tuned: bool = True
    processes: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot be run."""
        for name, most in (("seeds", None), ("trials", TRIALS), ("processes", None), ("steps", None)):
            value = getattr(self, name)
            if value is not None and (value < 1 or (most is not None and value > most)):
                raise ConfigError(f"--{name} must be 1 {f'to {most}' if most else 'or more'}, got {value}.")

    @property
    def known(self) -> EmbeddedModel:
        """What the model is compared on."""
        return MODELS[self.model]

    def trials_of(self, method: str) -> list[Run]:
        """Return the trials of a method, none if nothing is tuned."""
        space = spaces(self.model).get(method, {}) if self.tuned else {}
        runs = []
        for settings in combinations(space)[: self.trials] if space else []:
            folder = self.output / method / "trials" / label_of(settings).replace("=", "-").replace(" ", "_")
            changes = [*self.length(method, TRIAL_SHARE), *written(settings), f"train.seed={TRIAL_SEED}"]
            runs.append(self._run(method, "trial", folder, changes, settings=settings, tuning=True))
        return runs

    def seeds_of(self, method: str, settings: Settings) -> list[Run]:
        """Return the runs of a method that are compared."""
        kind = "seed" if self.tuned else "recipe"
        folders = [self.output / method / f"{kind}-{seed}" for seed in range(self.seeds)]
        changes = [*self.length(method), *written(settings)]
        return [
            self._run(method, "seed", folder, [*changes, f"train.seed={seed}"], settings=settings)
            for seed, folder in enumerate(folders)
        ]

    def variants_of(self, method: str, label: str, sets: Sequence[str], tuning: bool) -> list[Run]:
        """Return the runs of a recipe with other settings under a name of their own; nothing else is tuned."""
        folder = self.output / "variants" / label
        changes = [*self.length(method), *sets]
        return [
            self._run(method, "seed", folder / f"seed-{seed}", [*changes, f"train.seed={seed}"], tuning=tuning)
            for seed in range(self.seeds)
        ]

    def length(self, method: str, share: float = 1.0) -> list[str]:
        """Return how long a run is, as settings: whole, or a share of it with as short a warm-up."""
        own = method_runs.read_recipe(f"{self.known.recipes}/{method}")
        whole = own.train.max_train_steps if own.is_online else self.steps or self.known.steps
        if share == 1:
            return [f"train.max_train_steps={whole}"]
        tried = spaces(self.model).get(method, {}).get("rollout.updates", [])
        unit = math.lcm(own.rollout.updates, *tried) if own.is_online else 1  # a run stops where a rollout does
        short = unit * max(1, round(share * whole / unit))
        return [
            f"train.max_train_steps={short}",
            f"train.checkpointing_steps={short}",
            f"optimizer.lr_warmup_steps={round(share * own.optimizer.lr_warmup_steps)}",
        ]

    def _run(self, method: str, kind: str, folder: Path, changes: Sequence[str], **options: Any) -> Run:
        recipe = f"{self.known.recipes}/{method}"
        return Run(method, kind, recipe, folder, self.output, tuple(changes), **options)


def spaces(model: str) -> dict[str, dict[str, list[Any]]]:
    """Return the values to try by method and setting."""
    return _spaces(SPACES, model)


@cache
def _spaces(file: Path, model: str) -> dict[str, dict[str, list[Any]]]:
    """Read the search spaces.

    Raises:
        ConfigError: a method is there twice, or has another number of combinations than TRIALS.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for names, space in parse_yaml(file.read_text(encoding="utf8"), str(file))[model].items():
        if (count := len(combinations(space))) != TRIALS:
            raise ConfigError(f"{file}: {names} has {count} combinations, every method has {TRIALS}.")
        for name in (name.strip() for name in names.split(",")):
            if name in found:
                raise ConfigError(f'{file}: "{name}" is there twice.')
            found[name] = space
    return found


def combinations(space: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Return every combination of a search space's values."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def chosen(model: str, only: Sequence[str], tuned: bool) -> list[str]:
    """Return the methods to run: those named, or all with a search space.

    Raises:
        ConfigError: an unknown method, or one without a search space that should be tuned.
    """
    recipes = sorted(file.stem for file in (method_runs.RECIPES / MODELS[model].recipes).glob("*.yaml"))
    for name in only:
        if name not in recipes:
            raise ConfigError(
                f'There is no method "{name}".{suggestion(name, recipes)} Available: {", ".join(recipes)}.'
            )
        if tuned and name not in spaces(model):
            raise ConfigError(f'"{name}" has no search space: write one into {SPACES.name}, or give --no-tuning.')
    return list(dict.fromkeys(only)) or list(spaces(model))


def best_settings(trials: Sequence[tuple[Run, dict[str, Any]]]) -> Settings | None:
    """Return the settings of the trial with the oracle's highest win rate (then gain); None if all have failed."""
    finished = [(run, row["scores"]["oracle"]) for run, row in trials if "scores" in row]
    if not finished:
        return None
    return max(finished, key=lambda trial: (trial[1]["win_rate"], trial[1]["aligned"] - trial[1]["base"]))[0].settings


def written(settings: Settings) -> list[str]:
    """Return settings as KEY=VALUE."""
    return [f"{key}={value}" for key, value in settings.items()]


def label_of(settings: Settings) -> str:
    """Word settings for people, each by the end of its key."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
