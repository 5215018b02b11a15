"""How far the probabilities of a scorer can be believed: expected calibration error and the reliability table."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from diffalign.errors import DataError

BINS = 10


def reliability(probabilities: ArrayLike, bins: int = BINS) -> pd.DataFrame:
    """Return low, high, pairs, confidence and accuracy of each bin of confidence that holds a pair.

    The confidence of a pair is max(p, 1 - p), p = P(chosen preferred); the scorer is right if p > 1/2, half right at
    1/2. `bins` of equal width divide [0.5, 1]; a confidence on a border counts below it.

    Args:
        probabilities: [n] of the image that people chose, in [0, 1].
        bins: at least 1.

    Raises:
        DataError: no probabilities, or numbers outside [0, 1].
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"Expected at least one probability in [0, 1], got shape {p.shape}.")
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) + 0.5 * (p == 0.5)
    edges = np.linspace(0.5, 1.0, bins + 1)
    which = np.digitize(confidence, edges[1:-1], right=True)
    rows = [
        (edges[b], edges[b + 1], int(inside.sum()), confidence[inside].mean(), right[inside].mean())
        for b in range(bins)
        if (inside := which == b).any()
    ]
    return pd.DataFrame(rows, columns=["low", "high", "pairs", "confidence", "accuracy"])


def expected_calibration_error(probabilities: ArrayLike, bins: int = BINS) -> float:
    """Return sum_b (n_b / n) |accuracy_b - confidence_b| over the bins of `reliability` (Guo et al. 2017, eq. 3)."""
    table = reliability(probabilities, bins)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["pairs"]).sum() / table["pairs"].sum())
