"""Compare several models with one baseline: the same numbers as of two, adjusted for looking at all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation.comparison import Comparison, without_nan
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.results import Bootstrap, sign_test
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.statistics import wilson_interval
from diffalign.evaluation.verdict import p_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Hold the scores of a baseline and other models on the same prompts and seeds, and what follows from them.

    Every model is compared with the baseline as in `Comparison`; Holm's adjustment counts all models and scorers.
    """

    scores: pd.DataFrame  # prompt_id, prompt, seed, model, scorer, score
    baseline: str
    attributes: pd.DataFrame | None = None  # the same with `attribute`
    categories: pd.DataFrame | None = None  # prompt_id, and a column for every kind of category
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    settings: Mapping[str, Any] = field(default_factory=dict)  # how the pictures were drawn; only recorded

    def __post_init__(self) -> None:
        """Raise UserError without the baseline or something to compare it with; DataError for prompts unknown."""
        names = list(self.scores["model"].unique())
        if self.baseline not in names:
            hint = suggestion(self.baseline, names)
            raise UserError(f'There is no model "{self.baseline}" to compare with.{hint} Models: {", ".join(names)}.')
        if len(names) < 2:
            raise UserError(f'There is only one model, "{names[0]}". Name at least one more to compare it with.')
        if self.categories is not None:
            unknown = set(self.scores["prompt_id"]) - set(self.categories["prompt_id"])
            if unknown:
                raise DataError(f"Prompt {min(unknown)} has scores but no categories. Use the same prompts for both.")

    @property
    def models(self) -> list[str]:
        """The names of the models compared with the baseline, in the order they were given."""
        return [name for name in self.scores["model"].unique() if name != self.baseline]

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers, in the order they were given."""
        return list(self.scores["scorer"].unique())

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """The comparison of every model with the baseline."""
        alone = {name: self._comparison(name) for name in self.models}
        tests = {name: [sign_test(c.per_prompt(s)) for s in c.scorers] for name, c in alone.items()}
        return {
            name: replace(c, further_tests=tuple(p for other in tests if other != name for p in tests[other]))
            for name, c in alone.items()
        }

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per model and scorer: mean and median of it and of the baseline, and all else of the result."""
        rows = []
        for name, comparison in self.comparisons.items():
            for scorer, result in comparison.results.items():
                record = asdict(result)
                named = {
                    "mean": record.pop("aligned"),
                    "median": record.pop("aligned_median"),
                    "baseline_mean": record.pop("base"),
                    "baseline_median": record.pop("base_median"),
                }
                about = {"model": name, "baseline": self.baseline, "scorer": scorer}
                rows.append({**about, **named, **record, "verdict": result.verdict})
        return pd.DataFrame(rows)

    @property
    def categories_of_prompts(self) -> dict[int, tuple[str, ...]]:
        """The categories of every prompt by prompt_id, one of each kind."""
        if self.categories is None:
            return {}
        table = self.categories.set_index("prompt_id")
        return {int(index): tuple(map(str, row)) for index, row in zip(table.index, table.to_numpy(), strict=True)}

    @cached_property
    def category_table(self) -> pd.DataFrame:
        """One row per kind of category, category, model and scorer; empty without categories.

        Columns: kind, category, model, scorer, n_prompts, mean, median, baseline_mean, baseline_median, win_rate and
        its Wilson interval. Not adjusted for how many there are: they say where to look, not what is so.
        """
        rows = []
        for kind in [] if self.categories is None else self.categories.columns.drop("prompt_id"):
            of_prompt = self.categories.set_index("prompt_id")[kind]
            for name, comparison in self.comparisons.items():
                for scorer in comparison.scorers:
                    prompts = comparison.per_prompt(scorer)
                    for category, part in prompts.groupby(of_prompt.reindex(prompts.index), sort=False):
                        rows.append(
                            {"kind": kind, "category": category, "model": name, "scorer": scorer, **self._row(part)}
                        )
        return pd.DataFrame(rows)

    def summary(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what summary.json holds."""
        first = next(iter(self.comparisons.values()))
        return {
            "baseline": self.baseline,
            "models": {
                name: {key: c.summary()[key] for key in ("scorers", "attributes")}
                for name, c in self.comparisons.items()
            },
            "n_prompts": first.n_prompts,
            "categories": self.category_table.to_dict("records"),
            "bootstrap": asdict(self.bootstrap),
            "settings": dict(self.settings),
        } | dict(extra or {})

    def markdown(self) -> str:
        """Return the tables of models and of categories in Markdown."""
        level = f"{self.bootstrap.level:.0%}"
        head = [
            "model",
            "scorer",
            "mean",
            "median",
            "difference",
            "win rate",
            f"{level} interval",
            "won/tied/lost",
            "p (Holm)",
            "verdict",
        ]
        rows = [self._line(row) for row in self.table.itertuples()]
        parts = [
            f"Win rates are against {self.baseline}; ties count half.",
            _markdown(head, self._baseline_lines() + rows),
        ]
        for kind, part in self.category_table.groupby("kind", sort=False) if len(self.category_table) else ():
            lines = [
                [
                    *(r.category, r.model, r.scorer, str(r.n_prompts), format_score(r.mean), format_score(r.median)),
                    *(f"{100 * r.win_rate:.1f}%", f"{100 * r.wilson_low:.1f}% to {100 * r.wilson_high:.1f}%"),
                ]
                for r in part.itertuples()
            ]
            head = [kind, "model", "scorer", "prompts", "mean", "median", "win rate", f"{level} Wilson interval"]
            parts.append(_markdown(head, lines))
        return "\n\n".join(parts) + "\n"

    def _repr_markdown_(self) -> str:
        """Show the tables in a notebook."""
        return self.markdown()

    def write(self, directory: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Write scores.parquet, summary.json, .csv and .md, categories.csv and attributes.parquet if any."""
        directory = Path(directory)
        text = json.dumps(without_nan(self.summary(extra)), indent=2, default=str, allow_nan=False) + "\n"
        frames = {"summary.csv": self.table, "categories.csv": self.category_table}
        for name, frame in frames.items():
            if len(frame):
                with atomic_write(directory / name) as file:
                    frame.to_csv(file, index=False)
        for name, frame in {"scores.parquet": self.scores, "attributes.parquet": self.attributes}.items():
            if frame is not None:
                with atomic_write(directory / name) as file:
                    frame.to_parquet(file, index=False)
        for name, content in {"summary.json": text, "summary.md": self.markdown()}.items():
            with atomic_write(directory / name) as file:
                file.write_text(content, encoding="utf8")
        return directory

    def _comparison(self, name: str) -> Comparison:
        attributes = {}
        if self.attributes is not None:
            tables = self._of(self.attributes, self.baseline), self._of(self.attributes, name)
            attributes = dict(zip(("base_attributes", "aligned_attributes"), tables, strict=True))
        tables = self._of(self.scores, self.baseline), self._of(self.scores, name)
        return Comparison.from_tables(*tables, **attributes, bootstrap=self.bootstrap, settings=self.settings)

    @staticmethod
    def _of(table: pd.DataFrame, model: str) -> pd.DataFrame:
        return table[table["model"] == model]

    def _row(self, part: pd.DataFrame) -> dict[str, Any]:
        """Summarise the prompts of one category."""
        wilson = wilson_interval(float(part["win"].sum()), len(part), self.bootstrap.level)
        return {
            "n_prompts": len(part),
            "mean": float(part["aligned"].mean()),
            "median": float(part["aligned"].median()),
            "baseline_mean": float(part["base"].mean()),
            "baseline_median": float(part["base"].median()),
            "win_rate": float(part["win"].mean()),
            "wilson_low": wilson.low,
            "wilson_high": wilson.high,
        }

    def _baseline_lines(self) -> list[list[str]]:
        results = next(iter(self.comparisons.values())).results
        scores = {scorer: (format_score(r.base), format_score(r.base_median)) for scorer, r in results.items()}
        return [[self.baseline, scorer, *values, *[""] * 6] for scorer, values in scores.items()]

    @staticmethod
    def _line(row: Any) -> list[str]:
        return [
            row.model,
            row.scorer,
            format_score(row.mean),
            format_score(row.median),
            f"{row.mean_difference:+.4g}",
            f"{100 * row.win_rate:.1f}%",
            "n/a" if pd.isna(row.ci_low) else f"{100 * row.ci_low:.1f}% to {100 * row.ci_high:.1f}%",
            f"{row.wins}/{row.ties}/{row.losses}",
            p_text(row.p_value_holm),
            row.verdict,
        ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
