"""What papers report, beside the numbers of `diffalign evaluate`: chosen here, tabled by `evaluation.published`."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console

from diffalign.evaluation import Evaluation, published
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.jobs.evaluating import protocols
from diffalign.jobs.scoring import tables

_SETTINGS = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale"}  # in a manifest
_COLUMNS = ["model", "scorer", "part", "statistic", "value"]


def beside(
    result: Evaluation, prompts: PromptSet, record: Mapping[str, Any], console: Console
) -> tuple[list[published.Beside], dict[str, Any]]:
    """Show what papers report on the same prompts by the same scorers or benchmark, and in what they did otherwise.

    Args:
        result: of the run.
        prompts: what was drawn.
        record: what `protocols.write` and `protocols.hps` found.
        console: where to tell.

    Returns:
        tables: for the report.
        extra: the numbers themselves, for summary.json.
    """
    own = _averages(result)
    own = pd.concat([own, _benchmarks(own, prompts, record)], ignore_index=True)
    run = {name: result.settings[key] for name, key in _SETTINGS.items() if key in result.settings}
    run["n_prompts"] = len(prompts.table)
    judges = own["scorer"][own["statistic"] == published.BENCHMARK].unique()
    found = published.beside(prompts.name, result.scorers, run, judges)
    if found.empty:
        return [], {}
    warnings = {name: record[name]["differs"] for name in protocols.JUDGED if name in record}
    made = published.side_by_side(found, own, warnings)
    for item in made:
        if item.warning:  # said already; the report has it
            continue
        table = tables.plain(
            "model", *item.columns, "reported by", "differs in", title=f"What papers report. {item.title}"
        )
        for line in item.lines:
            table.add_row(line.model, *line.cells, line.source, line.note)
        console.print(table)
    return made, {"published": found.astype(object).where(found.notna(), None).to_dict("records")}


def _averages(result: Evaluation) -> pd.DataFrame:
    """Return mean and median of every model and scorer, the baseline first."""
    first = next(iter(result.comparisons.values())).results
    rows = [(result.baseline, name, r.base, r.base_median) for name, r in first.items()]
    rows += [(row.model, row.scorer, row.mean, row.median) for row in result.table.itertuples()]
    table = pd.DataFrame(rows, columns=["model", "scorer", "mean", "median"]).assign(part="")
    return table.melt(["model", "scorer", "part"], var_name="statistic")[_COLUMNS]


def _benchmarks(averages: pd.DataFrame, prompts: PromptSet, record: Mapping[str, Any]) -> pd.DataFrame:
    """Return what the benchmarks say of every model, from 0 to 1.

    Tasks and styles are there only where the prompts are the benchmark's own. On some of HPSv2's prompts the mean
    stands for its whole.
    """
    rows: list[tuple[str, str, str, float]] = []
    for name, level, largest in (("geneval", "tasks", 1), ("dpg", "broad", 100)):
        for model, summary in record.get(name, {}).get("models", {}).items():
            parts = {"overall": summary["overall"], **(summary[level] if prompts.name == name else {})}
            rows += [(model, name, part, value / largest) for part, value in parts.items()]
    rows += [(r["model"], r["scorer"], r["style"], r["score"] / 100) for r in record.get("hps_benchmark", ())]
    if prompts.name == "hpdv2" and "hps_benchmark" not in record:
        of_hps = averages[averages["scorer"].str.startswith("hpsv2") & (averages["statistic"] == "mean")]
        rows += [(row.model, row.scorer, "all", row.value) for row in of_hps.itertuples()]
    return pd.DataFrame(rows, columns=["model", "scorer", "part", "value"]).assign(statistic=published.BENCHMARK)
