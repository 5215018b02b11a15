"""The preference margin of a proxy reward: how clearly a scorer tells the two images of a pair apart.

    m_i = | r(c_i, x_i^w) - r(c_i, x_i^l) |        "absolute", as in FiFA's reconstruction
    m_i =   r(c_i, x_i^w) - r(c_i, x_i^l)          "signed", the default of `diffalign filter`: negative
                                                   where the scorer contradicts the label

Source: arXiv:2410.10166, as reconstructed in docs/filtering.md (the paper's code could not be read).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffalign.errors import DataError, suggestion
from diffalign.filtering.files import read_table

MODES = ("absolute", "signed")


def margins(
    chosen: NDArray[np.float64], rejected: NDArray[np.float64], mode: str = "absolute", cap: float | None = None
) -> NDArray[np.float64]:
    """Return the margins [N] of scores [N] and [N], at most `cap` in size; NaN where a score is missing."""
    difference = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    margin = np.abs(difference) if mode == "absolute" else difference
    return margin if cap is None else np.clip(margin, -cap, cap)


def read_scores(path: str | Path, scorer: str | None = None) -> pd.DataFrame:
    """Read what `diffalign score --pairs` writes: score_chosen and score_rejected by example_id, of one scorer.

    Args:
        path: parquet, csv or jsonl with example_id, score_chosen, score_rejected and, where several scorers are in it,
            scorer.
        scorer: which of them; None if there is one only.

    Raises:
        DataError: unreadable, without the columns, of several scorers, or with two different scores for one pair.
    """
    columns = ("example_id", "score_chosen", "score_rejected")
    table = read_table(path, columns, 'a file of "diffalign score --pairs"', numbers=columns)
    table = _of_scorer(table, scorer, path)
    scores = table[["example_id", "score_chosen", "score_rejected"]].drop_duplicates()
    if twice := int(scores.duplicated("example_id").sum()):
        raise DataError(f"{path} gives {twice} pairs more than one score. Keep one run of each scorer in it.")
    numbers = scores.set_index("example_id").astype(np.float64)
    if (broken := ~np.isfinite(numbers).all(axis=1)).any():
        raise DataError(f"{path} has {int(broken.sum())} scores that are not finite. Score these pairs again.")
    return numbers


def _of_scorer(table: pd.DataFrame, scorer: str | None, path: str | Path) -> pd.DataFrame:
    if "scorer" not in table:
        if scorer is None:
            return table
        raise DataError(f'{path} has no column "scorer" to look for "{scorer}" in. Leave out --scorer.')
    names = [str(name) for name in table["scorer"].unique()]
    if scorer is None and len(names) > 1:
        raise DataError(f"{path} holds scores of {', '.join(names)}. Say which, e.g. --scorer {names[0]}.")
    if scorer is not None and scorer not in names:
        raise DataError(f'{path} has no scores of "{scorer}".{suggestion(scorer, names)} It has: {", ".join(names)}.')
    return table if scorer is None else table[table["scorer"] == scorer]
