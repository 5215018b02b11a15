"""Compare two models picture by picture: who wins, by how much, and how sure that is."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.results import AttributeResult, Bootstrap, ScorerResult, sign_test
from diffalign.evaluation.statistics import holm, prompt_wins

_KEYS = ["prompt_id", "seed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Hold the scores of two models on the same prompts and seeds, and what follows from them.

    Win rates give ties half credit. Intervals come from a paired bootstrap over prompts: they tell how far a number
    would move with other prompts of the same kind, and nothing about another training run or about people's taste.
    """

    scores: pd.DataFrame  # prompt_id, prompt, seed, model, scorer, score; base rows first
    base_name: str
    aligned_name: str
    attributes: pd.DataFrame | None = None  # the same with `attribute`
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    settings: Mapping[str, Any] = field(default_factory=dict)  # how the pictures were drawn; only recorded
    further_tests: tuple[float, ...] = ()  # p-values of what else was looked at (other models), for Holm's adjustment

    @classmethod
    def from_tables(
        cls,
        base: pd.DataFrame,
        aligned: pd.DataFrame,
        *,
        base_attributes: pd.DataFrame | None = None,
        aligned_attributes: pd.DataFrame | None = None,
        **options: Any,
    ) -> Self:
        """Pair two score tables, one model each, picture by picture.

        Args:
            base: as returned by `score_table`, of the model started from.
            aligned: the same scorers, prompts and seeds with the trained model.
            base_attributes: as returned by `attribute_table`, or None.
            aligned_attributes: the same for the trained model.
            options: `bootstrap` and `settings` of the comparison.

        Raises:
            DataError: if a picture has a score from only one model, is scored twice, or its prompts differ. Nothing
                is ever left out silently.
        """
        names = [_model_name(base), _model_name(aligned)]
        if names[0] == names[1]:
            raise DataError(f'Both score tables are of model "{names[0]}". Give the models different names.')
        _require_paired(base, aligned, ["scorer"])
        attributes = None
        if base_attributes is not None and aligned_attributes is not None:
            _require_paired(base_attributes, aligned_attributes, ["scorer", "attribute"])
            attributes = pd.concat([base_attributes, aligned_attributes], ignore_index=True)
        scores = pd.concat([base, aligned], ignore_index=True)
        return cls(scores=scores, base_name=names[0], aligned_name=names[1], attributes=attributes, **options)

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers, in the order they were given."""
        return list(self.scores["scorer"].unique())

    @property
    def n_prompts(self) -> int:
        """Number of different prompts."""
        return int(self.scores["prompt_id"].nunique())

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per scorer and pair of pictures: scorer, prompt_id, seed, prompt, base, aligned, difference."""
        is_base = self.scores["model"] == self.base_name
        base = self.scores[is_base].rename(columns={"score": "base"})
        aligned = self.scores[~is_base].rename(columns={"score": "aligned"})[["scorer", *_KEYS, "aligned"]]
        merged = base.merge(aligned, on=["scorer", *_KEYS], validate="one_to_one")
        merged["difference"] = merged["aligned"] - merged["base"]
        return merged[["scorer", *_KEYS, "prompt", "base", "aligned", "difference"]]

    def per_prompt(self, scorer: str) -> pd.DataFrame:
        """Return base, aligned, difference, win and prompt by prompt_id, the seeds of a prompt averaged."""
        chosen = self.pairs[self.pairs["scorer"] == scorer]
        if chosen.empty:
            hint = suggestion(scorer, self.scorers)
            raise UserError(f'No scores of "{scorer}". Available: {", ".join(self.scorers)}.{hint}')
        table = chosen.groupby("prompt_id")[["base", "aligned"]].mean()
        table["difference"] = table["aligned"] - table["base"]
        table["win"] = prompt_wins(table["aligned"], table["base"])
        table["prompt"] = chosen.groupby("prompt_id")["prompt"].first()
        return table

    @cached_property
    def results(self) -> dict[str, ScorerResult]:
        """The summary of every scorer."""
        tables = {scorer: self.per_prompt(scorer) for scorer in self.scorers}
        tests = [*(sign_test(table) for table in tables.values()), *self.further_tests]
        adjusted = holm(tests)[: len(tables)]
        return {
            scorer: ScorerResult.of(
                table,
                self.bootstrap,
                n_images=int((self.pairs["scorer"] == scorer).sum()),
                p_value_holm=p_value,
                tests=len(tests),
            )
            for (scorer, table), p_value in zip(tables.items(), adjusted, strict=True)
        }

    @cached_property
    def attribute_results(self) -> dict[str, dict[str, AttributeResult]]:
        """The summary of every attribute by scorer; empty without attributes."""
        if self.attributes is None:
            return {}
        results: dict[str, dict[str, AttributeResult]] = {}
        for (scorer, attribute), rows in self.attributes.groupby(["scorer", "attribute"], sort=False):
            by_model = rows.groupby(["model", "prompt_id"])["score"].mean()
            base, aligned = by_model[self.base_name], by_model[self.aligned_name]
            results.setdefault(scorer, {})[attribute] = AttributeResult.of(base, aligned, self.bootstrap)
        return results

    def describe(self, scorer: str) -> str:
        """Return in plain words who wins and whether the prompts settle it."""
        result = self.results[scorer]
        rate = f"{100 * result.win_rate:.1f}%"
        head = f"{self.aligned_name} scored higher than {self.base_name} on {rate} of {result.n_prompts} prompts"
        if result.ties:
            head += f", counting {result.ties} {'tie' if result.ties == 1 else 'ties'} as half"
        if not math.isnan(result.ci_low):
            head += f" ({self.bootstrap.level:.0%} interval {100 * result.ci_low:.1f}% to {100 * result.ci_high:.1f}%)"
        return f"{head}. {result.evidence.sentence(scorer, self.base_name, self.aligned_name)}"

    def summary(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what summary.json holds; `extra` adds keys such as pairs_per_second."""
        record = {
            "base": self.base_name,
            "aligned": self.aligned_name,
            "scorers": {
                name: asdict(result) | {"verdict": result.verdict, "sentence": self.describe(name)}
                for name, result in self.results.items()
            },
            "attributes": {
                name: {attribute: asdict(result) for attribute, result in results.items()}
                for name, results in self.attribute_results.items()
            },
            "n_prompts": self.n_prompts,
            "bootstrap": asdict(self.bootstrap),
            "settings": dict(self.settings),
        }
        if taken := sorted(set(record) & set(extra or {})):
            raise UserError(f'summary.json has its own "{taken[0]}". Pass the extra value under another name.')
        return record | dict(extra or {})

    def write(self, directory: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Write scores.parquet, scores.csv, summary.json and, if any, attributes.parquet; return the folder."""
        directory = Path(directory)
        with atomic_write(directory / "scores.parquet") as file:
            self.scores.to_parquet(file, index=False)
        with atomic_write(directory / "scores.csv") as file:
            self.scores.to_csv(file, index=False)
        if self.attributes is not None:
            with atomic_write(directory / "attributes.parquet") as file:
                self.attributes.to_parquet(file, index=False)
        text = json.dumps(without_nan(self.summary(extra)), indent=2, default=str, allow_nan=False)
        with atomic_write(directory / "summary.json") as file:
            file.write_text(text + "\n")
        return directory

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Return a comparison written before, to report on it again without scoring."""
        directory = Path(directory)
        try:
            record = json.loads((directory / "summary.json").read_text())
            scores = pd.read_parquet(directory / "scores.parquet")
            attributes = directory / "attributes.parquet"
            return cls(
                scores=scores,
                base_name=record["base"],
                aligned_name=record["aligned"],
                attributes=pd.read_parquet(attributes) if attributes.exists() else None,
                bootstrap=Bootstrap(**record["bootstrap"]),
                settings=record["settings"],
            )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{directory} holds no readable comparison ({error}). Evaluate again.") from error


def pick_prompts(comparison: Comparison, scorer: str, count: int, how: str = "spread") -> list[int]:
    """Return up to `count` prompt ids to show.

    Args:
        comparison: the comparison to choose from.
        scorer: whose differences decide.
        count: at least 1.
        how: "spread" takes evenly spaced ranks from the largest win to the largest loss, so that the choice is no
            advertisement; "wins" and "losses" take that end; "first" takes the first prompts of the list.
    """
    table = comparison.per_prompt(scorer)
    ranked = table.sort_values("difference", ascending=False, kind="stable").index.to_numpy()
    spread = np.linspace(0, len(ranked) - 1, max(1, min(count, len(ranked)))).round().astype(int)
    choices = {
        "spread": lambda: ranked[spread],
        "wins": lambda: ranked[:count],
        "losses": lambda: ranked[::-1][:count],
        "first": lambda: table.index.to_numpy()[:count],
    }
    if how not in choices or count < 1:
        raise UserError(f'Cannot pick {count} prompts by "{how}": expected at least 1 by {", ".join(choices)}.')
    return [int(prompt_id) for prompt_id in choices[how]()]


def _model_name(table: pd.DataFrame) -> str:
    names = list(table["model"].unique())
    if len(names) != 1:
        raise DataError(f"A score table to compare holds one model, got {', '.join(map(str, names)) or 'none'}.")
    return str(names[0])


def _require_paired(base: pd.DataFrame, aligned: pd.DataFrame, kinds: list[str]) -> None:
    keys = [*kinds, *_KEYS]
    for table in (base, aligned):
        if table.duplicated(keys).any():
            row = table[table.duplicated(keys)].iloc[0]
            raise DataError(
                f'"{row.model}" has several scores of {row.scorer} for prompt {row.prompt_id} and seed {row.seed}. '
                "Pass the seeds of the pictures, or a prompt_id for each."
            )
    joined = base.merge(aligned, on=keys, how="outer", indicator=True, suffixes=("", "_aligned"))
    lonely = joined[joined["_merge"] != "both"]
    if len(lonely):
        row = lonely.iloc[0]
        missing = _model_name(aligned if row["_merge"] == "left_only" else base)
        raise DataError(
            f'{len(lonely)} scores have no partner: "{missing}" lacks {row.scorer} of prompt {row.prompt_id} with seed '
            f"{row.seed}. Draw and score the same prompts and seeds with both models."
        )
    changed = joined[joined["prompt"] != joined["prompt_aligned"]]
    if len(changed):
        row = changed.iloc[0]
        raise DataError(
            f"Prompt {row.prompt_id} is {row.prompt!r} for one model, {row.prompt_aligned!r} for the other."
        )


def without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by null."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
