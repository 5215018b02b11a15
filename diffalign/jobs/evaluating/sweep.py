"""`diffalign train CONFIG --sweep KEY=V1,V2`: a run for each value, one comparison of them all."""

import gc
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console

from diffalign import config as configuration
from diffalign.config import Config
from diffalign.errors import ConfigError, UserError
from diffalign.evaluation import SamplingSettings
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.jobs.evaluating import evaluate as evaluating
from diffalign.jobs.scoring import scorers as scoring
from diffalign.jobs.scoring import tables
from diffalign.jobs.training import plan, preflight
from diffalign.jobs.training.train import train
from diffalign.training import metrics
from diffalign.training.trainer import NonFiniteLoss
from diffalign.yaml_text import parse_yaml, read_yaml, split_values

OWN = ("output_dir", "resume_from_checkpoint")  # what every run has of its own
SHOWN = ("loss", "implicit_accuracy", "margin", "reward")  # what fits on a terminal
WATCHED = (*SHOWN, "chosen_drift", "rejected_drift", "grad_norm")
LONGEST = 120  # of the name of a folder
DONE, STOPPED = "done", "not finite"


@dataclass(frozen=True)
class Run:
    """Hold one run of a sweep."""

    name: str
    values: dict[str, str]  # by key, as they were written
    config: Config

    @property
    def folder(self) -> Path:
        """Return where it leaves what it makes."""
        return Path(self.config.train.output_dir)


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Say how the models of a sweep are compared with their base."""

    prompts: PromptSet
    scorers: Sequence[str]

    def __post_init__(self) -> None:
        """Raise UserError for scorers that do not exist."""
        scoring.parse(self.scorers)


def runs_of(file: Path, overrides: Sequence[str], sweeps: Sequence[str], resume: bool = False) -> list[Run]:
    """Return the runs of a sweep: every combination of the values, each valid by itself.

    Args:
        file: the configuration.
        overrides: for all of them.
        sweeps: KEY=V1,V2,...; of several keys, the grid.
        resume: go on with what was interrupted.

    Raises:
        ConfigError: a key without values, twice or unknown, or a configuration that is impossible.
    """
    axes = dict(_axis(text) for text in sweeps)
    if len(axes) < len(sweeps):
        raise ConfigError("--sweep names a key twice. Give all of its values at once, e.g. objective.beta=1000,5000.")
    runs = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = _folder_name(chosen)
        try:
            config = configuration.load(file, [*overrides, *(f"{key}={value}" for key, value in chosen.items())])
        except ConfigError as error:
            raise ConfigError(f"{error} (of {name})") from None
        own = {"output_dir": str(Path(config.train.output_dir) / name)}
        own |= {"resume_from_checkpoint": "latest"} if resume else {}
        runs.append(Run(name, chosen, config.model_copy(update={"train": config.train.model_copy(update=own)})))
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--sweep has the same values twice: {twice[0]}.")
    return runs


def _axis(text: str) -> tuple[str, list[str]]:
    key, sign, values = (part.strip() for part in text.partition("="))
    if not key or not sign or not values:
        raise ConfigError(f'A sweep is written KEY=VALUE,VALUE, e.g. objective.beta=1000,5000; got "{text}".')
    if key.rpartition(".")[2] in OWN:
        raise ConfigError(f'--sweep "{key}": every run has its own, in a folder of train.output_dir. Leave it out.')
    return key, split_values(values, f'The sweep "{text}"')


def _folder_name(values: dict[str, str]) -> str:
    """Name the folder of a run by its values, in letters that every file system takes."""
    name = ",".join(f"{key}={_safe(value)}" for key, value in values.items())
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9]}-{digest}"


def _safe(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-") or "empty"


def examine(runs: Sequence[Run], overwrite: bool = False) -> list[preflight.Findings]:
    """Look at everything that could stop any of the runs; data that they share is opened once."""
    opened: dict[str, Any] = {}
    found = []
    for run in runs:
        key = run.config.data.model_dump_json()
        found.append(preflight.examine(run.config, source=opened.get(key), overwrite=overwrite))
        opened[key] = found[-1].source
    return found


def require(runs: Sequence[Run], found: Sequence[preflight.Findings]) -> None:
    """Raise what would stop any of the runs, each fault once, with the runs it is of unless it is of all."""
    of: dict[str, list[str]] = {}
    for run, findings in zip(runs, found, strict=True):
        for fault in findings.faults:
            of.setdefault(str(fault), []).append(run.name)
    faults: list[Exception] = [
        UserError(fault if len(names) == len(runs) else f"{fault} (of {'; '.join(names)})")
        for fault, names in of.items()
    ]
    preflight.Findings(faults=faults).require()


def dry_run(
    runs: Sequence[Run],
    console: Console,
    gpu_memory: float | None = None,
    full: bool = False,
    *,
    overwrite: bool = False,
) -> None:
    """Print which runs there would be, and the summary of the first.

    Raises:
        UserError: what would stop any of them, all of it.
    """
    found = examine(runs, overwrite)
    console.print(f"{len(runs)} runs, one after another:")
    for run in runs:
        state = ", finished" if run.config.train.resume_from_checkpoint and finished(run) else ""
        console.print(f"  {run.folder}{state}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nThe first of them:")
    plan.show(runs[0].config, found[0], console, gpu_memory, full)
    require(runs, found)


def sweep(
    runs: Sequence[Run], console: Console, judging: Judging | None = None, *, overwrite: bool = False
) -> pd.DataFrame:
    """Train every run that is not finished, then compare them: print a table, write sweep.csv and sweep.md.

    Under `accelerate launch` all processes train each run together.

    Raises:
        UserError: what would stop any of the runs, before the first of them starts.
    """
    require(runs, examine(runs, overwrite))
    main = os.environ.get("RANK", "0") == "0"
    todo = [run for run in runs if not (run.config.train.resume_from_checkpoint and finished(run))]
    outcomes = {run.name: DONE for run in runs}
    for number, run in enumerate(runs, 1):
        if main:
            console.rule(f"{number}/{len(runs)}  {run.name}{'' if run in todo else ': finished before'}")
        if run in todo:
            outcomes[run.name] = _train(run, console, overwrite)
    if not main:
        return pd.DataFrame()
    table = compared(runs, outcomes)
    if judging is not None:
        table = _judged(table, [run for run in runs if outcomes[run.name] == DONE], judging, console)
    present(table, runs[0].folder.parent, console)
    return table


def _train(run: Run, console: Console, overwrite: bool) -> str:
    """Train one run and return how it ended; a loss that is not finite ends this run only."""
    try:
        train(run.config, overwrite=overwrite)
    except NonFiniteLoss as error:
        console.print(f"{run.name}: {error}", markup=False, highlight=False)
        return STOPPED
    finally:
        for state in (AcceleratorState, GradientState, PartialState):  # of the process, made for this run
            state._reset_state()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return DONE


def finished(run: Run) -> bool:
    """Tell whether a run of this very configuration was trained to its end and its result written."""
    file = run.folder / "config.yaml"
    if not file.is_file() or not (run.folder / "README.md").is_file():
        return False
    lines = metrics.read(run.folder / "metrics.jsonl")
    done, wanted = read_yaml(file), parse_yaml(configuration.dump(run.config), str(file))
    for content in (done, wanted):
        content["train"].pop("resume_from_checkpoint", None)
    return done == wanted and bool(lines) and lines[-1]["step"] == run.config.train.max_train_steps


def compared(runs: Sequence[Run], outcomes: dict[str, str]) -> pd.DataFrame:
    """Return a row for each run: its values, how it ended, and the last line of its metrics."""
    rows = []
    for run in runs:
        lines = metrics.read(run.folder / "metrics.jsonl")
        rows.append({"run": run.name, **run.values, "outcome": outcomes[run.name], **(lines[-1] if lines else {})})
    return pd.DataFrame(rows)


def _judged(table: pd.DataFrame, runs: Sequence[Run], judging: Judging, console: Console) -> pd.DataFrame:
    """Draw the prompts with every model and their base, and add mean scores and win rates against the base."""
    config, parent = runs[0].config, runs[0].folder.parent
    side = config.data.resolution
    request = evaluating.Request(
        specs=[str(run.folder) for run in runs],
        prompts=judging.prompts,
        seeds=[0],
        scorers=judging.scorers,
        out=parent / "evaluation",
        settings=SamplingSettings(
            num_inference_steps=config.validation.num_inference_steps,
            guidance_scale=config.validation.guidance_scale,
            long_prompts=config.data.long_prompts,
            height=side,
            width=side,
        ),
        show_base=True,
    )
    found = evaluating.evaluate(request, console=console).table
    for scorer, part in found.groupby("scorer", sort=False):
        by_run = part.set_index("model")
        table[scorer] = table["run"].map(by_run["mean"])
        table[f"{scorer} win rate"] = table["run"].map(by_run["win_rate"])
    return table


def present(table: pd.DataFrame, folder: Path, console: Console) -> None:
    """Print the comparison and write it: sweep.csv with all metrics, sweep.md with those that people watch."""
    judged = [name for name in table.columns if name.endswith("win rate")]
    scored = [name for judge in judged for name in (judge.removesuffix(" win rate"), judge)]
    head = ["run", *(["outcome"] if (table["outcome"] != DONE).any() else []), "step"]
    shown = [*head, *(name for name in SHOWN if name in table), *scored]
    on_terminal = tables.plain(*(name.replace("_", " ") for name in shown), title="Last metrics of every run")
    for row in _cells(table, shown):
        on_terminal.add_row(*row)
    console.print(on_terminal)
    columns = [*head, *(name for name in WATCHED if name in table), *scored]
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *_cells(table, columns))]
    with atomic_write(folder / "sweep.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf8")
    tables.write(table, folder / "sweep.csv")
    console.print(f"{folder / 'sweep.md'}, and all metrics in {folder / 'sweep.csv'}", markup=False, highlight=False)


def _cells(table: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    return [[_cell(row.get(name)) for name in columns] for row in table.to_dict("records")]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return "" if value is None else str(value)
