"""Preference pairs: their images as a source to score, and what the scores say about the labels."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from scipy.special import expit

from diffalign.data import PairSource, RowError
from diffalign.data.fingerprints import digest_bytes, stable_id
from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation.accuracy import tie_aware_accuracy
from diffalign.evaluation.calibration import expected_calibration_error, reliability
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.statistics import prompt_wins, wilson_interval
from diffalign.jobs.scoring import tables
from diffalign.jobs.scoring.engine import Judge
from diffalign.jobs.scoring.items import Item, Source
from diffalign.jobs.scoring.shares import Index
from diffalign.text_files import shown

# What equal scores count as, by name; agreement is 1, 0.5 or 0 a pair. PickScore's rule also makes near scores equal.
TIE_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half": lambda agreement: agreement,
    "wrong": lambda agreement: (agreement == 1).astype(float),  # ImageReward's test set: evaluation.ranked_accuracy
    "right": lambda agreement: (agreement > 0).astype(float),  # HPDv2's: evaluation.inversion_score
    "exclude": lambda agreement: agreement[agreement != 0.5],
}
PICKSCORE = "pickscore"


@dataclass(frozen=True)
class TieRule:
    """Say how accuracy counts pairs that a scorer holds for equal.

    name: "half" a right answer, "wrong", "right", "exclude", or "pickscore": half, equal is |2 p - 1| <= threshold.
    threshold: of "pickscore", in [0, 1]; the authors choose among 0, 0.1, ..., 1 on their validation set.
    """

    name: str = "half"
    threshold: float = 0.0

    def __post_init__(self):
        names = (*TIE_RULES, PICKSCORE)
        if self.name not in names:
            hint = suggestion(self.name, names)
            raise UserError(f'Unknown tie rule "{self.name}".{hint} Available: {", ".join(names)}.')
        if not 0 <= self.threshold <= 1 or (self.threshold and self.name != PICKSCORE):
            raise UserError(
                f"--tie-threshold lies in [0, 1] and belongs to --tie-rule {PICKSCORE}, got {self.threshold}."
            )

    def accuracy(self, agreement: np.ndarray, probability: np.ndarray) -> tuple[float, int]:
        """Return the accuracy over pairs [n], NaN if none counts, and how many count."""
        if self.name == PICKSCORE:
            both = np.stack([probability, 1 - probability], axis=1)
            return tie_aware_accuracy(both, np.ones(len(both)), self.threshold), len(both)
        counted = TIE_RULES[self.name](agreement)
        return (float(counted.mean()) if len(counted) else float("nan")), len(counted)


class PairImages(Source):
    """Offer the images of pairs: the chosen one at 2 i, the rejected one at 2 i + 1."""

    group = 2

    def __init__(self, pairs: PairSource):
        if pairs.images_per_example not in (2, None):
            raise DataError(f"{pairs.name} holds lists or single images, not pairs. Score the picture files instead.")
        self.pairs, self.name = pairs, pairs.name

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield both images of pairs start / 2 to stop / 2, each to be scored for the prompt of the chosen one."""
        for index in range(start // 2, stop // 2):
            try:
                row = self.pairs[index]
            except RowError as error:
                name = shown(f"{error.place.file}, {error.place.unit} {error.place.row}")
                yield from (Item(2 * index + side, name, "", None, error.detail) for side in (0, 1))
                continue
            for side, (ref, caption) in enumerate(zip(row.images, row.prompts, strict=True)):
                data = ref.data if ref.data is not None else str(ref.path)
                name = shown(f"{ref.place.file}, {ref.place.unit} {ref.place.row}")
                yield Item(2 * index + side, name, row.prompts[0], data, None, caption)

    def content(self) -> str:
        """Return a hash of the data, all of which is read for it."""
        return digest_bytes(json.dumps(self.pairs.identify(), sort_keys=True, default=str).encode()).hex()

    def fault(self, position: int, detail: str) -> RowError:
        """Return the error of the row that a broken image stands in."""
        try:
            place = self.pairs[position // 2].images[position % 2].place
        except RowError as error:
            return error
        return RowError(place, "broken image", detail)


def pair_table(index: Index, judge: Judge, scores: np.ndarray) -> pd.DataFrame:
    """Return one row per pair of which both images have a score.

    Columns: example_id, prompt, scorer, score_chosen, score_rejected, probability that the scorer gives to the chosen
    image winning, and agreement with the human label (1, 0, or 0.5 for equal scores).

    Args:
        index: of both images of n pairs, 2 n.
        judge: whose scores they are.
        scores: [2 n], NaN for broken images.
    """
    won, lost = scores[0::2], scores[1::2]
    kept = np.flatnonzero(np.isfinite(won) & np.isfinite(lost))
    won, lost = won[kept], lost[kept]
    prompts = [index.captions[2 * i] for i in kept]
    images = index.images()
    wins = prompt_wins(won, lost)
    # The oracle measures: what it says is no matter of probability.
    scale = getattr(judge.scorer, "preference_scale", None)
    return pd.DataFrame(
        {
            "example_id": [_example_id(prompts[n], index, images, 2 * i) for n, i in enumerate(kept)],
            "prompt": prompts,
            "scorer": judge.identity.scorer,
            "score_chosen": won,
            "score_rejected": lost,
            "probability": wins if scale is None else expit(scale * (won - lost)),
            "agreement": wins,
        }
    )


def summary(scores: pd.DataFrame, rule: TieRule | None = None) -> pd.DataFrame:
    """Return by scorer: pairs, counted, accuracy, low, high (95 %), ties, mean P(chosen), calibration error."""
    rule, rows = rule or TieRule(), []
    for name, part in scores.groupby("scorer", sort=False):
        agreement, p = part["agreement"].to_numpy(), part["probability"].to_numpy()
        accuracy, counted = rule.accuracy(agreement, p)
        low, high = wilson_interval(accuracy * counted, counted) if counted else (float("nan"),) * 2
        row: dict[str, Any] = {"scorer": name, "pairs": len(part), "tie_rule": rule.name, "counted": counted}
        row |= {"accuracy": accuracy, "low": low, "high": high, "ties": int((agreement == 0.5).sum())}
        certain = bool(np.isin(p, (0.0, 0.5, 1.0)).all())  # the oracle: nothing to calibrate
        error = float("nan") if certain else expected_calibration_error(p)
        rows.append(row | {"mean_probability": p.mean(), "calibration_error": error})
    return pd.DataFrame(rows)


def agreement(scores: pd.DataFrame, rule: TieRule | None = None) -> Table:
    """Return by scorer how often it agrees with the label, with the interval of that, and how sure it is."""
    names = ("scorer", "pairs", "accuracy", "95 % interval", "ties", "mean P(chosen)", "calibration error")
    table = tables.plain(*names, title=None if rule is None else f"Ties: {rule.name}")
    for row in summary(scores, rule).itertuples():
        cells = [f"{row.accuracy:.3f}", f"{row.low:.3f} to {row.high:.3f}", str(row.ties)]
        error = "" if np.isnan(row.calibration_error) else f"{row.calibration_error:.3f}"
        table.add_row(str(row.scorer), str(row.pairs), *cells, format_score(row.mean_probability), error)
    return table


def calibration(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the reliability table of every scorer that gives probabilities, below one another."""
    uncertain = summary(scores).dropna(subset=["calibration_error"])["scorer"]
    groups = {name: part["probability"].to_numpy() for name, part in scores.groupby("scorer", sort=False)}
    parts = [reliability(groups[name]).assign(scorer=name) for name in uncertain]
    columns = ["scorer", "low", "high", "pairs", "confidence", "accuracy"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def reliability_table(bins: pd.DataFrame) -> Table:
    """Return a reliability table for the terminal."""
    table = tables.plain("scorer", "confidence", "pairs", "mean confidence", "accuracy", title="Calibration")
    for row in bins.itertuples():
        interval = f"{row.low:.2f} to {row.high:.2f}"
        table.add_row(str(row.scorer), interval, str(row.pairs), f"{row.confidence:.3f}", f"{row.accuracy:.3f}")
    return table


def _example_id(prompt: str, index: Index, images: list[str], first: int) -> int:
    """Return what `Example.example_id` would be."""
    other = index.captions[first + 1]
    others = [digest_bytes(other.encode())] if other != prompt else []
    return stable_id(prompt, *(bytes.fromhex(image) for image in images[first : first + 2]), *others)
