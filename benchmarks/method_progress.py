"""What the comparison of methods has already, and how long the rest will take."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.method_plan import TRIAL_SHARE, Request, Run, best_settings
from benchmarks.method_results import Performed
from diffalign.progress import clock

Kind = tuple[str, str]  # method, trial or seed


@dataclass
class Found:
    """Hold the rows that a method has, and the runs that it still needs."""

    trials: list[Performed]
    seeds: list[Performed]
    needed: Counter[Kind]
    stale: list[str]  # rows of another world, in words

    @property
    def complete(self) -> bool:
        """Whether the method can be shown."""
        return not self.needed and bool(self.seeds) and all("scores" in row for _, row in self.seeds)


class Remaining:
    """Estimate how long the runs that are left will take, from those that are finished."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.left: Counter[Kind] = Counter()
        self.seconds: defaultdict[Kind, list[float]] = defaultdict(list)

    def add(self, method: str, found: Found) -> None:
        """Take in what a method has and needs."""
        self.left += found.needed
        for kind, performed in (("trial", found.trials), ("seed", found.seeds)):
            self.seconds[method, kind] += [row["seconds"] for _, row in performed]

    def finish(self, run: Run, row: dict[str, Any]) -> None:
        """Take in that a run is done."""
        self.left[run.method, run.kind] -= 1
        self.seconds[run.method, run.kind].append(row["seconds"])

    def estimate(self) -> float | None:
        """Return the seconds that are left; None if nothing is finished yet."""
        total = 0.0
        for (method, kind), count in (+self.left).items():
            one = self._median(method, kind)
            if one is None:
                return None
            total += count * one
        return total / self.processes

    def _median(self, method: str, kind: str) -> float | None:
        """Return the median of such runs of the method; else of its other kind, else of all methods, scaled."""
        other = "seed" if kind == "trial" else "trial"
        factor = TRIAL_SHARE if kind == "trial" else 1 / TRIAL_SHARE
        for known, scale in (((method, kind), 1.0), ((method, other), factor)):
            if self.seconds.get(known):
                return scale * statistics.median(self.seconds[known])
        for wanted, scale in ((kind, 1.0), (other, factor)):
            if every := [time for (_, of), times in self.seconds.items() if of == wanted for time in times]:
                return scale * statistics.median(every)
        return None

    def __str__(self) -> str:
        count, seconds = (+self.left).total(), self.estimate()
        if not count:
            return "no runs left"
        time = "how long they take is known after the first" if seconds is None else f"about {clock(seconds)}"
        return f"runs left: {count}, {time}"


def examine(request: Request, method: str) -> Found:
    """Return which rows of a method there are, of this world, and which are needed."""
    found = Found([], [], Counter(), [])
    trials = request.trials_of(method)
    found.trials = _read(trials, found)
    settings = best_settings(found.trials) if trials else {}
    if len(found.trials) < len(trials):
        found.needed[method, "seed"] += request.seeds
    elif settings is not None:  # else every trial has failed, and nothing follows
        found.seeds = _read(request.seeds_of(method, settings), found)
    return found


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have no row of this world."""
    return [run for run, (row, different) in ((run, run.read()) for run in runs) if row is None or different]


def _read(runs: Sequence[Run], found: Found) -> list[Performed]:
    rows = []
    for run in runs:
        row, different = run.read()
        if row is not None and not different:
            rows.append((run, row))
            continue
        found.needed[run.method, run.kind] += 1
        if row is not None:
            found.stale.append(f"{run.method}/{run.folder.name}: {' and '.join(different)}")
    return rows
