"""Read a run's metrics.jsonl and turn it into charts with a word on what each shows."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from diffalign.errors import DataError
from diffalign.evaluation.scoring import format_score
from diffalign.text_files import read_lines
from diffalign.webpages.plots import Chart, curve_plot

Series = tuple[list[float], list[float]]  # steps, values


# title, keys of metrics.jsonl, level to mark, what it means
_CHARTS = (
    ("Loss", ("loss",), None, "The objective, averaged over the pairs of a step."),
    (
        "Implicit accuracy",
        ("implicit_accuracy",),
        0.5,
        "Share of pairs in which the policy moved towards the chosen picture more than towards the rejected one. "
        "One half is chance.",
    ),
    (
        "Margin",
        ("margin",),
        0.0,
        "How much more the error fell for chosen pictures than for rejected ones, against the reference. Above zero is "
        "wanted.",
    ),
    (
        "Drift",
        ("chosen_drift", "rejected_drift"),
        0.0,
        "Policy error minus reference error. Rejected above chosen is wanted; both rising together means the policy "
        "is leaving the reference.",
    ),
    ("Gradient norm", ("grad_norm",), None, "Before clipping."),
    ("Learning rate", ("learning_rate",), None, "As scheduled."),
    ("Speed", ("pairs_per_second",), None, "Preference pairs per second."),
)


def read_metrics(file: str | Path) -> dict[str, Series]:
    """Return the finite numbers of every key of a metrics.jsonl by step; of a step logged twice the later counts.

    A resumed run logs the steps after its checkpoint again. An unfinished last line, left by a run that was killed, is
    passed over.

    Raises:
        DataError: if the file is missing, or another line is not a JSON object with a "step".
    """
    file = Path(file)
    try:
        lines = read_lines(file)
    except OSError as error:
        raise DataError(f"The metrics {file} cannot be read ({error.strerror}). Pass a run's metrics.jsonl.") from error
    by_key: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = float(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise DataError(f'Line {number} of {file} is not a JSON object with a "step": {line[:80]!r}.') from error
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                by_key.setdefault(key, {})[step] = float(value)
    return {key: (sorted(values), [values[step] for step in sorted(values)]) for key, values in by_key.items()}


def training_charts(metrics: Mapping[str, Series]) -> list[Chart]:
    """Return a chart for each known quantity logged at two steps or more."""
    charts = []
    for title, keys, level, note in _CHARTS:
        curves = {key: metrics[key] for key in keys if key in metrics and len(metrics[key][0]) > 1}
        if not curves:
            continue
        names = [key.removesuffix("_drift") for key in curves]
        legend = tuple(zip(("aligned", "loss"), names, strict=False)) if len(keys) > 1 else ()
        last = " / ".join(_last(values) for _, values in curves.values())
        svg = curve_plot(curves, f"{title} by optimiser step", level, smooth=title != "Learning rate")
        charts.append(Chart(title, note, svg, legend, last))
    return charts


def _last(values: list[float]) -> str:
    """Return the mean of the last twentieth of the values, so that one noisy step does not stand for the run."""
    tail = values[-max(1, len(values) // 20) :]
    mean = sum(tail) / len(tail)
    return f"{mean:.2e}" if 0 < abs(mean) < 0.01 else format_score(mean)
