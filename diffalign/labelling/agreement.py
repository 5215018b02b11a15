"""Do raters agree more than chance would make them: Krippendorff's alpha and Cohen's kappa."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from diffalign.errors import DataError


def krippendorff_alpha(
    values: Sequence[Sequence[float | None]], level: Literal["nominal", "interval"] = "nominal"
) -> float:
    """Return Krippendorff's alpha (2011): 1 is agreement, 0 what chance gives, below 0 worse than chance.

    alpha = 1 - D_observed / D_expected, with the squared difference between two ratings of a unit being [a != b]
    (nominal) or (a - b)^2 (interval). Units that fewer than two rated are left out. NaN if nothing was rated twice or
    all ratings are equal.

    Args:
        values: [units][raters], None where a rater did not rate a unit.
        level: how far two ratings differ.
    """
    if level not in ("nominal", "interval"):
        raise DataError(f'The level of measurement is nominal or interval, got "{level}".')
    units = [[float(v) for v in unit if v is not None and not np.isnan(v)] for unit in values]
    units = [unit for unit in units if len(unit) > 1]
    pooled = np.array([value for unit in units for value in unit])
    if len(pooled) == 0:
        return float("nan")
    observed = sum(_difference(np.array(unit), level) / (len(unit) - 1) for unit in units) / len(pooled)
    expected = _difference(pooled, level) / (len(pooled) * (len(pooled) - 1))
    return float("nan") if expected == 0 else float(1 - observed / expected)


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return Cohen's kappa (1960) of two raters of the same units; NaN if chance alone explains full agreement."""
    if len(a) != len(b) or not a:
        raise DataError(f"Kappa needs the ratings of the same units by both raters, got {len(a)} and {len(b)}.")
    kinds = sorted(set(a) | set(b), key=str)
    agreed = np.mean([x == y for x, y in zip(a, b, strict=True)])
    chance = sum(np.mean([x == k for x in a]) * np.mean([y == k for y in b]) for k in kinds)
    return float("nan") if chance == 1 else float((agreed - chance) / (1 - chance))


def agreement_of(votes: pd.DataFrame) -> dict[str, Any]:
    """Return how far the raters agree on the tasks that several of them judged.

    Args:
        votes: task, rater and credit (1 where model_a was chosen, 0 where model_b, 0.5 for a tie).

    Returns:
        raters, votes, shared_tasks, share_equal (of the pairs of votes on a task), alpha_nominal, alpha_interval (a tie
        counts as half way), and kappa: one entry per pair of raters with both names, kappa and the number of tasks.
    """
    wide = votes.pivot_table(index="task", columns="rater", values="credit", aggfunc="last")
    shared = wide[wide.notna().sum(axis=1) > 1]
    units = shared.to_numpy().tolist()
    equal = [x == y for unit in units for x, y in combinations([v for v in unit if not np.isnan(v)], 2)]
    kappas = []
    for one, other in combinations(wide.columns, 2):
        both = wide[[one, other]].dropna()
        if len(both):
            kappa = cohen_kappa(both[one].tolist(), both[other].tolist())
            kappas.append({"raters": [one, other], "kappa": kappa, "tasks": len(both)})
    return {
        "raters": int(votes["rater"].nunique()),
        "votes": len(votes),
        "shared_tasks": len(shared),
        "share_equal": float(np.mean(equal)) if equal else float("nan"),
        "alpha_nominal": krippendorff_alpha(units, "nominal"),
        "alpha_interval": krippendorff_alpha(units, "interval"),
        "kappa": kappas,
    }


def _difference(values: np.ndarray, level: str) -> float:
    """Return the sum of the differences of all ordered pairs."""
    if level == "interval":
        return float(2 * (len(values) * (values**2).sum() - values.sum() ** 2))
    _, counts = np.unique(values, return_counts=True)
    return float(len(values) ** 2 - (counts**2).sum())
