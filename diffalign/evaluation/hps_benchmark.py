"""The benchmark of HPSv2: 4 styles x 800 prompts, one picture each (Wu et al. 2023, arXiv:2306.09341).

A style's score is the mean over its pictures, x 100; its spread is the population standard deviation of the means of
ten consecutive groups of 80 prompts (tgxs002/HPSv2, `evaluate_benchmark`). The official code leaves out pictures that
are missing without changing what it reports; here they are an error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from diffalign.errors import DataError

STYLES = ("anime", "concept-art", "paintings", "photo")
GROUPS = 10
PROMPTS = 800  # of a style


class StyleScore(NamedTuple):
    """Hold the mean of a style, and how far the means of its groups of prompts spread."""

    mean: float
    spread: float
    group_means: tuple[float, ...]


def style_score(scores: ArrayLike, groups: int = GROUPS) -> StyleScore:
    """Return the score of one style from its pictures' scores [n], in the order of the prompts; n % groups == 0."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0 or len(scores) % groups:
        raise DataError(f"A style needs a number of pictures that {groups} divides, got {scores.size}.")
    means = scores.reshape(groups, -1).mean(axis=1)
    return StyleScore(float(scores.mean()), float(means.std()), tuple(map(float, means)))


def benchmark(
    scores: pd.DataFrame, *, prompts: int = PROMPTS, styles: Sequence[str] = STYLES, groups: int = GROUPS
) -> pd.DataFrame:
    """Return style, score and spread (both x 100) and n, with "all" (the mean over all pictures) last.

    Args:
        scores: one model's, with style, prompt_id and score (the cosine, as HPSv2 returns it); one row a picture.
        prompts: of every style.
        styles: that there must be.
        groups: of prompts, for the spread.

    Raises:
        DataError: a style or a picture is missing.
    """
    rows = []
    for style in styles:
        part = scores[scores["style"] == style].sort_values("prompt_id", kind="stable")
        if part["prompt_id"].nunique() != prompts or len(part) != prompts:
            raise DataError(
                f"HPSv2's benchmark has {prompts} pictures of style {style}, one a prompt; there are {len(part)} of "
                f"{part['prompt_id'].nunique()} prompts."
            )
        result = style_score(part["score"].to_numpy(), groups)
        rows.append({"style": style, "score": 100 * result.mean, "spread": 100 * result.spread, "n": len(part)})
    chosen = scores[scores["style"].isin(list(styles))]
    everything = {"style": "all", "score": 100 * float(chosen["score"].mean()), "spread": np.nan, "n": len(chosen)}
    return pd.DataFrame([*rows, everything])
