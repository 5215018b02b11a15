"""What may be claimed of two models: the corrected test decides; the test alone and the interval only suggest."""

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "suggests better", "suggests worse", "undecided"]
_FEW_PROMPTS = 30  # below this the percentile bootstrap visibly undercovers


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Hold what a verdict rests on. Every claim about who is better, on console, page and in files, is worded here."""

    lead: int  # prompts won less prompts lost
    prompts: int
    low: float  # interval of the win rate, NaN for a single prompt
    high: float
    p_value: float  # of the sign test over prompts
    p_value_holm: float  # the same after Holm's adjustment
    tests: int = 1  # adjusted for so many
    level: float = 0.95

    @property
    def verdict(self) -> Verdict:
        """Return "better" or "worse" where the adjusted test is significant at 1 - level, "suggests ..." where only
        the test alone is, or only the interval lies on one side of one half, and else "undecided".
        """
        if self._settled:
            return "better" if self.lead > 0 else "worse"
        if self.p_value <= self._significant:
            return "suggests better" if self.lead > 0 else "suggests worse"
        if self.low > 0.5:
            return "suggests better"
        return "suggests worse" if self.high < 0.5 else "undecided"

    def claim(self, judge: str, base: str, aligned: str) -> str:
        """Return the verdict as a headline; arguments as of `sentence`."""
        name = aligned if self.verdict.endswith("better") else base
        if self.verdict == "undecided":
            return "No difference shown"
        return f"{judge} prefers {name}" if self._settled else f"Suggestive only: {judge} leans to {name}"

    def sentence(self, judge: str, base: str, aligned: str) -> str:
        """Return the verdict in words.

        Args:
            judge: who prefers, e.g. "oracle".
            base: the model that is "worse" where the verdict is "better".
            aligned: the other one.
        """
        if math.isnan(self.low):
            return "One prompt alone says nothing about others."
        claim, adjusted = self.claim(judge, base, aligned), f"{p_equals(self.p_value_holm)}{self._adjustment}"
        if self.verdict == "undecided":
            said = f"{claim} ({adjusted}): these prompts do not settle which of the two {judge} prefers."
        elif self._settled:
            said = f"{claim} ({adjusted})."
        else:
            said = f"{claim} ({self._hint}), but {adjusted} does not settle it."
        if self.prompts < _FEW_PROMPTS:
            said += f" With only {self.prompts} prompts the interval itself is rough and tends to be too narrow."
        return said

    @property
    def _settled(self) -> bool:
        return self.p_value_holm <= self._significant

    @property
    def _significant(self) -> float:
        return round(1 - self.level, 12)  # 0.05, not 0.050000000000000044

    @property
    def _adjustment(self) -> str:
        return f" after Holm's adjustment for {self.tests} tests" if self.tests > 1 else ""

    @property
    def _hint(self) -> str:
        """Return what speaks for one of the models without settling it."""
        hints = []
        if self.low > 0.5 or self.high < 0.5:
            hints.append(f"the interval lies {'above' if self.low > 0.5 else 'below'} 50%")
        if self.p_value <= self._significant:
            hints.append(f"{p_equals(self.p_value)} for this test alone")
        return " and ".join(hints)


def p_text(p_value: float) -> str:
    """Return a p-value for a table."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def p_equals(p_value: float) -> str:
    """Return a p-value for a sentence: "p = 0.204", "p < 0.001"."""
    return f"p {p_text(p_value)}" if p_value < 0.001 else f"p = {p_text(p_value)}"
