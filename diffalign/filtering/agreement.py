"""Does a selection keep the pairs whose labels the scorer agrees with, or gather those it contradicts?"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffalign.filtering.baselines import USES_MARGIN
from diffalign.filtering.importance import ImportanceSettings
from diffalign.filtering.margin import margins


def agreements(pairs: pd.DataFrame) -> NDArray[np.float64]:
    """Return [N] 1 where the scorer prefers the chosen image, 0 where the rejected one, 0.5 for a tie; NaN unscored."""
    signed = margins(pairs["score_chosen"], pairs["score_rejected"], "signed")
    return np.where(np.isnan(signed), np.nan, (np.sign(signed) + 1) / 2)


@dataclass(frozen=True)
class Agreement:
    """Hold how often the scorer agrees with the labels."""

    before: float  # of all scored pairs
    after: float  # of the kept ones
    kept: int

    @classmethod
    def of(cls, pairs: pd.DataFrame, kept: Any) -> Self | None:
        """Return the agreement before and after keeping the rows `kept`; None without scores on both sides."""
        if "score_chosen" not in pairs:
            return None
        found = agreements(pairs)
        before, after = found[np.isfinite(found)], found[kept][np.isfinite(found[kept])]
        return cls(float(before.mean()), float(after.mean()), len(after)) if len(after) else None

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """Return "better" if kept pairs agree more often than as many drawn at random would (95 %), "worse" if less
        often than all pairs, by however little.
        """
        if self.after < self.before:
            return "worse"
        chance = 1.96 * math.sqrt(self.before * (1 - self.before) / self.kept)
        return "better" if self.after > self.before + chance else "undecided"

    @property
    def claim(self) -> str:
        """The verdict as a headline."""
        how = {"better": "more often than", "worse": "less often than", "undecided": "hardly more often than"}
        if self.after == self.before:
            return "The kept pairs agree with their labels as often as all pairs"
        return f"The kept pairs agree with their labels {how[self.verdict]} all pairs"

    def warning(self, method: str, settings: ImportanceSettings) -> str | None:
        """Return what to say where the choice does not sort out wrong labels, and which knob helps.

        That is where the kept pairs agree less with their labels than all pairs; or hardly more, though they were
        chosen by a margin that does not look at the label.
        """
        blind = method in USES_MARGIN and settings.margin == "absolute"
        hardly = self.verdict == "undecided" and blind and self.before < 1
        if self.verdict != "worse" and not hardly:
            return None
        if blind:
            fix = "An absolute margin takes clear differences whatever the label says: use --margin signed, the default"
        elif method == "random":
            fix = "Random pairs are not chosen by agreement: this is chance, and --require-agreement would change it"
        elif method == "fifa" and settings.alpha > 0 and not settings.require_agreement:
            fix = f"Lower --alpha (now {settings.alpha:g}), so that the margin counts for more, or --require-agreement"
        else:
            fix = "Leave out pairs whose label the scorer contradicts with --require-agreement"
        than = "hardly more than" if hardly else "less than"
        return (
            f"The scorer agrees with {self.after:.1%} of the labels kept, {than} with all ({self.before:.1%}): if it "
            f"is right, the choice does not sort out wrong labels. {fix}."
        )
