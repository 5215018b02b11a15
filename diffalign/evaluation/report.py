"""Write a comparison as one web page that needs nothing else: no server, no network, no other file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from diffalign import __version__
from diffalign.errors import UserError, suggestion
from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.curves import read_metrics, training_charts
from diffalign.evaluation.gallery import Images, choose_examples, choose_pairs, gallery
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.published import TRUST, Beside
from diffalign.evaluation.results import ScorerResult
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.several import Evaluation
from diffalign.evaluation.verdict import p_text
from diffalign.webpages import MINUS, page
from diffalign.webpages.plots import Chart, difference_plot, distribution_plot

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
_EXAMPLES = 6  # prompts under the verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Say what the page about one comparison holds.

    Raises:
        UserError: for an unknown scorer; when written, for missing pictures or unreadable metrics.
    """

    comparison: Comparison  # the scores of both models
    images: Images | None = None  # model name -> (prompt_id, seed) -> file or picture; None leaves the gallery out
    metrics: str | Path | None = None  # the metrics.jsonl of the training run, for its curves
    config: Mapping[str, Any] | None = None  # the resolved configuration, shown as it is
    command: str = ""  # what to type to get this result again
    title: str = ""  # by default "<aligned> against <base>"
    primary: str | None = None  # the scorer of the headline and of the gallery's first order; by default the first
    gallery_size: int = 96  # pairs of pictures at most; see `choose_pairs` for which
    embed: bool = True  # the pictures (large ones shrunk to 512 pixels), or link to the files relative to the page
    evaluation: Evaluation | None = None  # what `comparison` is part of, for tables of all models and of categories
    pages: Mapping[str, str] = field(default_factory=dict)  # model -> its own page, relative to this one
    published: Sequence[Beside] = ()  # what papers report, beside the run's own numbers

    def __post_init__(self) -> None:
        """Raise UserError for a primary scorer that did not score."""
        known = self.comparison.scorers
        if self.primary is not None and self.primary not in known:
            hint = suggestion(self.primary, known)
            raise UserError(f'No scores of "{self.primary}". Available: {", ".join(known)}.{hint}')

    def write(self, file: Path) -> Path:
        """Write the page and return its path."""
        folder = None if self.embed else file.parent.absolute()
        content = vars(self) | self._scores() | self._material(folder)
        text = page("diffalign.evaluation", "report.html.j2", content, _FILTERS)
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return file

    @property
    def _primary(self) -> str:
        return self.primary or self.comparison.scorers[0]

    def _scores(self) -> dict[str, Any]:
        """Return what the template says about scores."""
        comparison, primary, evaluation = self.comparison, self._primary, self.evaluation
        model = comparison.aligned_name
        return {
            "title": self.title or f"{model} against {comparison.base_name}",
            "primary": primary,
            "results": comparison.results,
            "headline": comparison.results[primary],
            "sentence": comparison.describe(primary),
            "n_pairs": len(comparison.pairs) // len(comparison.scorers),
            "charts": {scorer: _score_charts(comparison, scorer) for scorer in comparison.scorers},
            "category_tables": _category_tables(evaluation, model, primary) if evaluation else {},
            "trust": TRUST,
        }

    def _material(self, folder: Path | None) -> dict[str, Any]:
        """Return what the template says about training, pictures and how all was made."""
        categories = self.evaluation.categories_of_prompts if self.evaluation else {}
        pairs, examples = [], []
        if self.images and self.gallery_size:
            shown = self.comparison, self._primary
            pairs = gallery(self.comparison, self.images, choose_pairs(*shown, self.gallery_size), folder, categories)
            examples = gallery(self.comparison, self.images, choose_examples(*shown, _EXAMPLES), folder)
        return {
            "training": training_charts(read_metrics(self.metrics) if self.metrics else {}),
            "pairs": pairs,
            "examples": examples,
            "category_names": list(dict.fromkeys(name for names in categories.values() for name in names)),
            "settings": _flat(self.comparison.settings),
            "config": yaml.safe_dump(_plain(self.config), sort_keys=False, allow_unicode=True) if self.config else "",
            "versions": {"diffalign": __version__} | {name: _version(name) for name in _PACKAGES},
        }


def write_report(file: str | Path, comparison: Comparison, images: Images | None = None, **content: Any) -> Path:
    """Write report.html and return its path; `content` is what else a `Report` holds."""
    return Report(comparison=comparison, images=images, **content).write(Path(file))


def _signed(value: float, largest: float | None = None) -> str:
    if math.isnan(value):
        return "n/a"
    text = format_score(value, largest)
    return text.replace("-", MINUS) if text.startswith("-") or float(text) == 0 else f"+{text}"


_FILTERS = {
    "score": lambda value, largest=None: format_score(value, largest).replace("-", MINUS),
    "signed": _signed,
    "p_value": p_text,
}


def _score_charts(comparison: Comparison, scorer: str) -> list[Chart]:
    table = comparison.per_prompt(scorer)
    base, aligned = table["base"].to_numpy(), table["aligned"].to_numpy()
    result: ScorerResult = comparison.results[scorer]
    return [
        Chart(
            "Change per prompt",
            f"{result.wins} prompts gained, {result.losses} lost and {result.ties} stayed the same.",
            difference_plot(aligned - base, f"{scorer}: difference of every prompt, sorted"),
            (("win", "gained"), ("loss", "lost")),
        ),
        Chart(
            "Scores of both models",
            "Number of prompts by score; dashed lines are the means.",
            distribution_plot(base, aligned, f"{scorer}: histograms of both models"),
            (("base", comparison.base_name), ("aligned", comparison.aligned_name)),
        ),
    ]


def _category_tables(evaluation: Evaluation, model: str, scorer: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of one model and scorer by kind of category."""
    table = evaluation.category_table
    if table.empty:
        return {}
    chosen = table[(table["model"] == model) & (table["scorer"] == scorer)]
    return {str(kind): part.to_dict("records") for kind, part in chosen.groupby("kind", sort=False)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level, e.g. "scheduler.class"."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None and value != "":
            flat[prefix + str(key)] = str(value)
    return flat


def _plain(config: Mapping[str, Any] | None) -> Any:
    return json.loads(json.dumps(config, default=str))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
