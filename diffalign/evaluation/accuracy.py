"""How often a scorer agrees with people: the three definitions that published accuracies rest on."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from diffalign.errors import DataError


def inversion_score(predicted: Sequence[float], truth: Sequence[float]) -> float:
    """Return 1 - (pairs in strictly opposite order) / (n (n - 1) / 2); ties on either side count as right.

    The ranking accuracy of HPDv2's test set (tgxs002/HPSv2, `inversion_score`): its mean over groups of pictures.

    Args:
        predicted: [n] ranks by the scorer.
        truth: [n] ranks by people.
    """
    predicted, truth = _aligned(predicted, truth)
    pairs = list(combinations(range(len(truth)), 2))
    if not pairs:
        raise DataError("A ranking needs at least 2 pictures, got 1.")
    wrong = sum((predicted[i] - predicted[j]) * (truth[i] - truth[j]) < 0 for i, j in pairs)
    return 1 - wrong / len(pairs)


def ranked_accuracy(scores: Sequence[float], ranks: Sequence[float]) -> float:
    """Return the share of pairs with different ranks whose better picture scores strictly higher.

    ImageReward's accuracy on its test set (tgxs002/HPSv2, `calc_ImageReward`), for one prompt. Equal scores are wrong.
    NaN if all ranks are equal.

    Args:
        scores: [n] higher is better.
        ranks: [n] by people, 1 is best.
    """
    scores, ranks = _aligned(scores, ranks)
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return float(np.mean([scores[i] > scores[j] for i, j in pairs])) if pairs else float("nan")


def tie_aware_accuracy(probabilities: ArrayLike, label_0: Sequence[float], threshold: float) -> float:
    """Return PickScore's accuracy: 1 for the label (a tie is one), 0.5 if one of label and prediction is a tie, else 0.

    predicted = tie if |p1 - p0| <= threshold, else the larger (yuvalkirstain/PickScore, `calc_acc`). The authors choose
    the threshold among 0, 0.1, ..., 1 on validation_unique and report test_unique.

    Args:
        probabilities: [n, 2] softmax over the two pictures.
        label_0: [n] 1, 0 or 0.5 for a tie.
        threshold: in [0, 1].
    """
    p = np.asarray(probabilities, dtype=np.float64)
    label = np.asarray(label_0, dtype=np.float64)
    if p.ndim != 2 or p.shape != (len(label), 2) or len(label) == 0:
        raise DataError(f"Expected probabilities [n, 2] and labels [n] with n >= 1, got {p.shape} and {label.shape}.")
    predicted = np.where(np.abs(p[:, 1] - p[:, 0]) <= threshold, 0.5, (p[:, 0] > p[:, 1]).astype(float))
    one_tie = (predicted == 0.5) != (label == 0.5)
    return float(np.where(predicted == label, 1.0, np.where(one_tie, 0.5, 0.0)).mean())


def _aligned(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise DataError(f"Expected one number per picture on both sides, got shapes {a.shape} and {b.shape}.")
    return a, b
