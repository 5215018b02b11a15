"""Numbers that papers report, to set a run beside: published.csv, with how each was measured and who vouches for it.

Scores are on the scale of this package's scorers: a paper's HPSv2 is divided by 100.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

FILE = Path(__file__).with_name("published.csv")


@cache
def table() -> pd.DataFrame:
    """Return all numbers.

    Columns: source, backbone, model, scorer, value, statistic (mean or median), prompt_set, n_prompts, steps,
    guidance_scale, and trust: who read the number where.
    """
    return pd.read_csv(FILE)


def beside(prompt_set: str, scorers: Sequence[str], run: dict[str, Any]) -> pd.DataFrame:
    """Return the numbers of the same prompt set and scorers, with `differs`: in what the run's protocol is another.

    Args:
        prompt_set: the kind, such as pickapic or hpdv2.
        scorers: of the run.
        run: its n_prompts, steps and guidance_scale.
    """
    found = table()
    found = found[(found["prompt_set"] == prompt_set) & found["scorer"].isin(list(scorers))].reset_index(drop=True)
    return found.assign(differs=[_differs(row, run) for row in found.to_dict("records")])


def _differs(row: dict[str, Any], run: dict[str, Any]) -> str:
    parts = []
    for name, value in run.items():
        theirs = row[name]
        if pd.isna(theirs):
            parts.append(f"{name} unknown")
        elif float(theirs) != float(value):
            parts.append(f"{name} {theirs:g}, here {value:g}")
    return "; ".join(parts)
