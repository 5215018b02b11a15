"""Rankings of pairs by name: FiFA's importance and what it should be compared with.

fifa           importance.py
margin         the proxy reward's margin alone
quality-aware  psi(x^w | c) * (1 - psi(x^l | c)), psi a scorer brought to [0, 1] (Quality-Aware Pair Ranking, TMLR
               submission 5995; its authors keep the best 5.33 % by HPSv2)
diverse        in turn the best pair of every prompt, then the second of every prompt, ... (by margin, or at random)
random         uniform, a pure function of seed and example id
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffalign.filtering.importance import Array, ImportanceSettings, importance
from diffalign.filtering.margin import margins

METHODS = ("fifa", "margin", "quality-aware", "diverse", "random")
NEEDS_SCORES = ("fifa", "margin", "quality-aware")
USES_MARGIN = ("fifa", "margin", "diverse")


def rank(
    method: str,
    pairs: pd.DataFrame,
    settings: ImportanceSettings,
    *,
    seed: int = 0,
    score_range: tuple[float, float] | None = None,
) -> Array:
    """Return the value [N] by which `method` ranks pairs; NaN for those it cannot rank.

    Args:
        method: one of METHODS.
        pairs: example_id and prompt_key, and as far as needed score_chosen, score_rejected, text_quality, and
            distance_k for the k of `settings`.
        settings: the constants of FiFA; "margin" and "diverse" use its margin mode and cap.
        seed: of "random" and, without scores, of "diverse".
        score_range: of quality-aware's psi; by default lowest and highest score.
    """
    margin = None
    if "score_chosen" in pairs:
        margin = margins(pairs["score_chosen"], pairs["score_rejected"], settings.margin, settings.margin_cap)
    if method == "random":
        return uniform(pairs["example_id"].to_numpy(), seed)
    if method == "margin":
        return margin
    if method == "quality-aware":
        return pair_quality(pairs["score_chosen"], pairs["score_rejected"], score_range)
    if method == "diverse":
        return round_robin(uniform(pairs["example_id"], seed) if margin is None else margin, pairs["prompt_key"])
    prompt_of, _ = pd.factorize(pairs["prompt_key"])
    quality = _of_prompts(pairs, "text_quality", prompt_of) if settings.alpha > 0 else None
    distance = _of_prompts(pairs, f"distance_{settings.neighbours}", prompt_of)
    return importance(margin, quality, distance, prompt_of, settings)


def pair_quality(chosen: Any, rejected: Any, score_range: tuple[float, float] | None = None) -> Array:
    """Return psi_w * (1 - psi_l) [N], psi = (score - low) / (high - low) clipped to [0, 1]."""
    chosen, rejected = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    both = np.concatenate([chosen, rejected])
    low, high = score_range or (np.nanmin(both), np.nanmax(both))
    psi_w, psi_l = (np.clip((x - low) / ((high - low) or 1.0), 0.0, 1.0) for x in (chosen, rejected))
    return psi_w * (1.0 - psi_l)


def round_robin(values: Array, groups: Any) -> Array:
    """Return a value [N] that ranks the best of every group first, then the second of every group, and so on."""
    table = pd.DataFrame({"value": np.asarray(values), "group": np.asarray(groups)}).sort_values(
        "value", ascending=False, kind="stable", na_position="last"
    )
    turn = table.groupby("group").cumcount()
    order = turn.sort_values(kind="stable").index.to_numpy()
    ranked = np.empty(len(table))
    ranked[order] = np.arange(len(table), 0, -1)
    return np.where(np.isnan(values), np.nan, ranked)


def uniform(ids: Any, seed: int) -> Array:
    """Return a number in [0, 1) for each id [N]: SplitMix64 of id and seed, so the order of a file does not matter."""
    with np.errstate(over="ignore"):
        x: NDArray[np.uint64] = np.asarray(ids).astype(np.uint64)
        x = x + np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _of_prompts(pairs: pd.DataFrame, column: str, prompt_of: NDArray[np.int64]) -> Array | None:
    """Return a column by prompt [P], in the order of `prompt_of`'s numbers; None if there is no such column."""
    if column not in pairs:
        return None
    return pairs[column].groupby(prompt_of).first().to_numpy(dtype=np.float64)
