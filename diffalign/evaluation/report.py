"""Write a comparison as one web page that needs nothing else: no server, no network, no other file."""

import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from diffalign import __version__
from diffalign.errors import UserError, suggestion
from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.curves import Chart, read_metrics, training_charts
from diffalign.evaluation.gallery import Images, gallery
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.plots import difference_plot, distribution_plot
from diffalign.evaluation.results import ScorerResult
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.several import Evaluation

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
_MINUS = "\N{MINUS SIGN}"


def write_report(
    file: str | Path,
    comparison: Comparison,
    images: Images | None = None,
    *,
    metrics: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    command: str = "",
    title: str = "",
    primary: str | None = None,
    gallery_size: int = 96,
    embed: bool = True,
    evaluation: Evaluation | None = None,
    pages: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html and return its path.

    Args:
        file: the page to write.
        comparison: the scores of both models.
        images: model name -> (prompt_id, seed) -> file or picture, e.g. `Manifest.images`; None leaves the gallery out.
        metrics: the metrics.jsonl of the training run, for its curves.
        config: the resolved configuration, shown as it is.
        command: what to type to get this result again.
        title: by default "<aligned> against <base>".
        primary: the scorer of the headline and of the gallery's first order; by default the first.
        gallery_size: pairs of pictures at most; see `choose_pairs` for which.
        embed: put the pictures into the page (large ones shrunk to 512 pixels), or link to the files relative to it.
        evaluation: what `comparison` is part of, for a table of all models and tables of categories.
        pages: model name -> page of its own, relative to `file`; linked from that table.

    Raises:
        UserError: for an unknown scorer, missing pictures or unreadable metrics.
    """
    file = Path(file)
    primary = primary or comparison.scorers[0]
    if primary not in comparison.results:
        hint = suggestion(primary, comparison.scorers)
        raise UserError(f'No scores of "{primary}". Available: {", ".join(comparison.scorers)}.{hint}')
    series = read_metrics(metrics) if metrics else {}
    folder = None if embed else file.parent.absolute()
    categories = evaluation.categories_of_prompts if evaluation else {}
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title or f"{comparison.aligned_name} against {comparison.base_name}",
            comparison=comparison,
            primary=primary,
            results=comparison.results,
            headline=comparison.results[primary],
            sentence=comparison.describe(primary),
            n_pairs=len(comparison.pairs) // len(comparison.scorers),
            charts={scorer: _score_charts(comparison, scorer) for scorer in comparison.scorers},
            training=training_charts(series),
            pairs=gallery(comparison, images, primary, gallery_size, folder, categories) if images else [],
            evaluation=evaluation,
            pages=dict(pages or {}),
            category_names=list(dict.fromkeys(name for names in categories.values() for name in names)),
            category_tables=_category_tables(evaluation, comparison.aligned_name, primary) if evaluation else {},
            settings=_flat(comparison.settings),
            config=yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True) if config else "",
            command=command,
            versions={"diffalign": __version__} | {name: _version(name) for name in _PACKAGES},
        )
    )
    with atomic_write(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffalign.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": lambda value, largest=None: format_score(value, largest).replace("-", _MINUS),
        "signed": _signed,
        "percent": lambda share, decimals=1: "n/a" if math.isnan(share) else f"{100 * share:.{decimals}f}%",
        "p_value": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
        "position": lambda share: f"{100 * share:.2f}%",
    }
    environment.tests["missing"] = math.isnan
    return environment


def _signed(value: float, largest: float | None = None) -> str:
    if math.isnan(value):
        return "n/a"
    text = format_score(value, largest)
    return text.replace("-", _MINUS) if text.startswith("-") or float(text) == 0 else f"+{text}"


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
