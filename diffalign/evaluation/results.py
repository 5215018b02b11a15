"""What one scorer, or one attribute, says about two models."""

from dataclasses import dataclass
from typing import Self

import pandas as pd

from diffalign.errors import UserError
from diffalign.evaluation.statistics import binomial_test, mean_difference, paired_bootstrap, wilson_interval
from diffalign.evaluation.verdict import Evidence, Verdict


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Say how intervals are made: coverage aimed at, number of resamples, seed of the resampling."""

    level: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for no resamples; nothing has been drawn yet."""
        if self.resamples < 1:
            raise UserError(f"The bootstrap needs at least 1 resample, got {self.resamples}. 10000 is usual.")

    @property
    def options(self) -> dict[str, float]:
        """The keyword arguments of `paired_bootstrap`."""
        return {"level": self.level, "n": self.resamples, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class ScorerResult:
    """Summarise one scorer; every number is over prompts, the pictures of a prompt averaged first."""

    base: float  # mean score
    aligned: float
    base_median: float
    aligned_median: float
    win_rate: float  # share of prompts on which the aligned model is higher, ties half
    ci_low: float  # of the win rate: paired percentile bootstrap over prompts; NaN for a single prompt
    ci_high: float
    wilson_low: float  # of the win rate: Wilson, ties split; keeps a width when one model wins everywhere
    wilson_high: float
    mean_difference: float  # aligned - base
    difference_low: float
    difference_high: float
    wins: int
    ties: int
    losses: int
    p_value: float  # exact sign test, ties left out
    p_value_holm: float  # the same, adjusted for the number of models and scorers
    n_prompts: int
    n_images: int  # of each model
    tests: int  # p_value_holm is adjusted for so many
    level: float  # of the intervals; 1 - level is what p-values are judged by

    @classmethod
    def of(
        cls, table: pd.DataFrame, bootstrap: Bootstrap, *, n_images: int, p_value_holm: float, tests: int = 1
    ) -> Self:
        """Summarise a table of base, aligned and win with one row per prompt."""
        base, aligned, wins = table["base"], table["aligned"], table["win"]
        ci = paired_bootstrap(aligned, base, **bootstrap.options)
        wilson = wilson_interval(float(wins.sum()), len(wins), bootstrap.level)
        difference = paired_bootstrap(aligned, base, mean_difference, **bootstrap.options)
        return cls(
            base=float(base.mean()),
            aligned=float(aligned.mean()),
            base_median=float(base.median()),
            aligned_median=float(aligned.median()),
            win_rate=float(wins.mean()),
            ci_low=ci.low,
            ci_high=ci.high,
            wilson_low=wilson.low,
            wilson_high=wilson.high,
            mean_difference=float(mean_difference(aligned, base)),
            difference_low=difference.low,
            difference_high=difference.high,
            wins=int((wins == 1).sum()),
            ties=int((wins == 0.5).sum()),
            losses=int((wins == 0).sum()),
            p_value=sign_test(table),
            p_value_holm=p_value_holm,
            n_prompts=len(table),
            n_images=n_images,
            tests=tests,
            level=bootstrap.level,
        )

    @property
    def tie_share(self) -> float:
        """Share of prompts with exactly equal scores."""
        return self.ties / self.n_prompts

    @property
    def evidence(self) -> Evidence:
        """What a claim about the two models rests on."""
        return Evidence(
            lead=self.wins - self.losses,
            prompts=self.n_prompts,
            low=self.ci_low,
            high=self.ci_high,
            p_value=self.p_value,
            p_value_holm=self.p_value_holm,
            tests=self.tests,
            level=self.level,
        )

    @property
    def verdict(self) -> Verdict:
        """What may be claimed of the aligned model."""
        return self.evidence.verdict


@dataclass(frozen=True, kw_only=True)
class AttributeResult:
    """Summarise one attribute over the prompts that mention it."""

    base: float  # mean in [0, 1]
    aligned: float
    mean_difference: float
    difference_low: float
    difference_high: float
    n_prompts: int

    @classmethod
    def of(cls, base: pd.Series, aligned: pd.Series, bootstrap: Bootstrap) -> Self:
        """Summarise one value per prompt of each model, aligned by prompt."""
        interval = paired_bootstrap(aligned, base, mean_difference, **bootstrap.options)
        return cls(
            base=float(base.mean()),
            aligned=float(aligned.mean()),
            mean_difference=float(mean_difference(aligned, base)),
            difference_low=interval.low,
            difference_high=interval.high,
            n_prompts=len(base),
        )


def sign_test(table: pd.DataFrame) -> float:
    """Return the exact two-sided p-value of a table's wins against its losses, ties left out."""
    wins, losses = int((table["win"] == 1).sum()), int((table["win"] == 0).sum())
    return binomial_test(wins, wins + losses)
