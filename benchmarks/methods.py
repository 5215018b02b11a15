"""`make methods`: methods from the same base, tuned with the same budget, three seeds each, in one table and one plot.

A method first runs six short trials of its written search space (search_spaces.yaml) on the tuning prompts, which the
table never shows; the settings with the highest win rate by the oracle are trained from three seeds and judged on the
demo's prompts. Interrupted, it goes on with the runs that have no row yet; rows of another base model, other data,
other judges or another recipe are told and made again. With a label, one method is run with other settings, as a
variant.
"""

import argparse
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.method_plan import MODELS, TRIALS, Request, Run, best_settings, chosen, label_of, spaces
from benchmarks.method_progress import Found, Remaining, examine, unfinished
from benchmarks.method_results import Tables, result_of, write, write_variants
from benchmarks.method_runs import ROOT, ROW, read_recipe
from diffalign.errors import ConfigError, UserError
from diffalign.progress import clock

RESULTS = ROOT / "benchmarks" / "results"


class Study:
    """Run what is asked for, and keep the tables in step with it.

    Args:
        request: what is asked for.
        results: the folder of the tables.
    """

    def __init__(self, request: Request, results: Path) -> None:
        self.request, self.folder = request, results
        self.found: dict[str, Found] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.remaining = Remaining(request.processes)
        self.speaking = threading.Lock()

    def run(self, methods: Sequence[str]) -> None:
        """Examine all methods, run those named (none for the tables alone), and write the tables after each."""
        listed = list(spaces(self.request.model)) if self.request.tuned else self._measured()
        for method in dict.fromkeys([*listed, *methods]):
            self.take_in(method)
        for line in (line for method, found in self.found.items() if method not in methods for line in found.stale):
            print(f"{line}: left out.", flush=True)
        for method in methods:
            self.remaining.add(method, self.found[method])
        if methods:
            print(f"{', '.join(methods)}: {self.remaining}.", flush=True)
        if self.results or not methods:  # else an older table stays until there is something to show
            self.write()
        in_parallel([partial(self.measure, method) for method in methods], self.request.processes, self.finish)

    def _measured(self) -> list[str]:
        """Return the methods with rows of their recipe's own settings."""
        return sorted({file.parts[-3] for file in self.request.output.glob(f"*/recipe-*/{ROW}")})

    def measure(self, method: str) -> str:
        """Make every run of a method that there is not: its trials, then its seeds."""
        trials = [(run, self.perform(run)) for run in self.request.trials_of(method)]
        settings = best_settings(trials) if trials else {}
        seeds = [] if settings is None else self.request.seeds_of(method, settings)
        self.remaining.left[method, "seed"] = len(unfinished(seeds))
        for run in seeds:
            self.perform(run)
        return method

    def perform(self, run: Run) -> dict[str, Any]:
        """Return the row of a run, and say what it says and how much is left."""
        row, different = run.read()
        if row is not None and not different:
            return row
        row = run.perform(threads=1 if self.request.processes > 1 else None)
        with self.speaking:
            self.remaining.finish(run, row)
            print(f"{line_of(run, row)}; {self.remaining}", flush=True)
        return row

    def finish(self, method: str) -> None:
        """Take in a method that is done, and write the tables anew."""
        self.take_in(method)
        self.write()

    def take_in(self, method: str) -> None:
        """Read what there is of a method."""
        self.results.pop(method, None)
        found = self.found[method] = examine(self.request, method)
        if found.complete:
            settings = found.seeds[0][0].settings
            online = read_recipe(f"{self.request.known.recipes}/{method}").is_online
            self.results[method] = result_of(found.seeds, settings=settings, online=online)

    def write(self) -> None:
        """Write the tables of what is known."""
        tables = Tables(results=list(self.results.values()))
        nothing = [method for method, found in self.found.items() if not found.trials and not found.seeds]
        for method, found in self.found.items():
            tables.trials += found.trials
            tables.runs += found.seeds if found.complete else []
            if not found.complete and method not in nothing:
                tables.missing.append(missing(self.request, method, found))
        tables.missing += [f"not measured: {', '.join(f'`{name}`' for name in nothing)}"] if nothing else []
        write(self.request, tables, self.folder)


def in_parallel(jobs: Sequence[Any], processes: int, finish: Any) -> None:
    """Do jobs, several at a time; hand over what each returns. The first that fails stops those not begun."""
    with ThreadPoolExecutor(processes) as pool:
        try:
            for done in as_completed([pool.submit(job) for job in jobs]):
                finish(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def line_of(run: Run, row: dict[str, Any]) -> str:
    """Word one run for a terminal."""
    what = f"{run.method}, {label_of(run.settings) if run.kind == 'trial' else run.folder.name}"
    if "failed" in row:
        return f"{what}: failed, {row['failed']}"
    oracle = row["scores"]["oracle"]
    interval = f"{oracle['low']:.3f} to {oracle['high']:.3f}"
    return f"{what}: win rate {oracle['win_rate']:.3f} ({interval}) in {clock(row['seconds'])}"


def missing(request: Request, method: str, found: Found) -> str:
    """Say why a method is not in the table."""
    failed = [f"{run.folder.name}: {row['failed']}" for run, row in found.seeds if "failed" in row]
    if failed:
        return f"`{method}` failed ({'; '.join(failed)})"
    if not found.needed:
        return f"`{method}`: all trials failed"
    had = f"{len(found.trials)} of {request.trials} trials, " if request.tuned else ""
    return f"`{method}`: {had}{len(found.seeds)} of {request.seeds} seeds"


def variants(request: Request) -> list[dict[str, Any]]:
    """Return the results of all variants whose runs are of this world."""
    results = []
    for folder in sorted(path for path in (request.output / "variants").glob("*") if path.is_dir()):
        performed, sets = [], []
        for file in sorted(folder.glob(f"seed-*/{ROW}")):
            row = json.loads(file.read_text(encoding="utf8"))
            method, changes = row["method"].rpartition("/")[2], tuple(row["changes"])
            run = Run(method, "seed", row["method"], file.parent, request.output, changes, tuning=row["tuning"])
            if not run.read()[1] and "scores" in row:
                performed.append((run, row))
                sets = [change for change in changes if not change.startswith("train.seed=")]
        if performed:
            online, tuning = read_recipe(performed[0][0].recipe).is_online, performed[0][0].tuning
            results.append(result_of(performed, variant=folder.name, sets=sets, online=online, tuning=tuning))
    return results


def run_variant(study: Study, method: str, label: str, sets: Sequence[str], tuning: bool) -> None:
    """Run one method's recipe with other settings, and write the table of all variants."""
    runs = study.request.variants_of(method, label, sets, tuning)
    study.remaining.left[method, "seed"] += len(unfinished(runs))
    print(f"{label}: {study.remaining}.", flush=True)
    in_parallel([partial(study.perform, run) for run in runs], study.request.processes, lambda row: None)
    write_variants(study.request, variants(study.request), study.folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks methods`."""
    parser.add_argument("--model", choices=list(MODELS), default="sdxl", help="which embedded model")
    parser.add_argument("--methods", default="", metavar="A,B", help="only these; by default all with a search space")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of each method that are compared")
    parser.add_argument(
        "--steps", type=int, help="of methods that learn from data; by default 200, of the sd3 model 250"
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"of each method, at most {TRIALS}")
    parser.add_argument("--no-tuning", action="store_true", help="no trials: every recipe's own settings")
    parser.add_argument("--table-only", action="store_true", help="train nothing, tabulate what there is")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, with one thread each if several")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="of a variant")
    parser.add_argument("--label", help="the name of a variant: one method with what --set says")
    parser.add_argument("--tuning-prompts", action="store_true", help="judge a variant on the prompts for tuning")
    parser.add_argument(
        "--output", type=Path, help="the folder of all runs; by default runs/methods, runs/flow-methods"
    )


def main(asked: argparse.Namespace, results: Path = RESULTS) -> None:
    """Do what the command line asks.

    Raises:
        SystemExit: a request that cannot be met, or a run that failed.
    """
    try:
        output = (asked.output or Path("runs") / MODELS[asked.model].results).resolve()
        request = Request(
            model=asked.model,
            output=output,
            seeds=asked.seeds,
            steps=asked.steps,
            trials=asked.trials,
            tuned=not asked.no_tuning,
            processes=asked.processes,
        )
        only = [name.strip() for name in asked.methods.split(",") if name.strip()]
        study = Study(request, results)
        if asked.label is None and (asked.sets or asked.tuning_prompts):
            raise ConfigError("--set and --tuning-prompts are of a variant: give it a name with --label.")
        if asked.label is not None:
            methods = chosen(asked.model, only, tuned=False)
            if len(only) != 1:
                raise ConfigError(f"A variant is of one method, got {len(only)}: name it with --methods.")
            run_variant(study, methods[0], asked.label, asked.sets, asked.tuning_prompts)
        else:
            methods = chosen(asked.model, only, request.tuned)
            study.run([] if asked.table_only else methods)
    except UserError as error:
        raise SystemExit(str(error)) from None
