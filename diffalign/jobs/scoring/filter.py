"""`diffalign filter`: choose preference pairs to train on, and show what was chosen."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console

from diffalign.data import PairSource, open_pairs
from diffalign.data.fingerprints import digest_files
from diffalign.errors import ConfigError, DataError, UserError, suggestion
from diffalign.evaluation.manifest import atomic_write
from diffalign.filtering import baselines, cleaning, margin, report, selection, text_entropy, text_quality, writing
from diffalign.filtering.agreement import Agreement
from diffalign.filtering.components import KEPT_NEIGHBOURS, Components
from diffalign.filtering.files import weights_identity
from diffalign.filtering.importance import ImportanceSettings
from diffalign.filtering.language_model import LanguageModelRater
from diffalign.folder_lock import held
from diffalign.jobs import skipped
from diffalign.jobs.devices import pick_device, pick_dtype
from diffalign.jobs.scoring import score, scorers, tables
from diffalign.progress import progress_bar

COMPONENTS, SELECTION, SCORES = "components.parquet", "selection.parquet", "scores.parquet"
TRAIN, VALIDATION, REPORT, RATINGS = "train.parquet", "validation.parquet", "report.html", "text_quality.jsonl"
MEMO = ".digests.sqlite"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Say what to choose from, by what, and how much."""

    source: str
    out: Path
    method: str = "fifa"
    keep: float | int = 0.1
    scores: Path | None = None  # of `diffalign score --pairs`
    scorer: str | None = None  # NAME[=PATH] to score with, or which scorer of `scores`
    text_quality: Path | None = None
    text_quality_model: str | None = None
    text_encoder: str | None = None
    settings: ImportanceSettings = field(default_factory=ImportanceSettings)
    dedupe: bool = True
    validation: float = 0.0  # share of the prompts held out
    seed: int = 0
    split: str = "train"
    limit: int | None = None
    root: Path | None = None
    skip_broken: bool = False
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self):
        if self.method not in baselines.METHODS:
            known = ", ".join(baselines.METHODS)
            raise ConfigError(
                f'Unknown method "{self.method}".{suggestion(self.method, baselines.METHODS)} Use {known}.'
            )
        if self.text_quality and self.text_quality_model:
            raise ConfigError("Give --text-quality FILE or --text-quality-model, not both.")
        if self.scorer and not self.scores and len(scorers.parse(self.scorer)) > 1:
            raise ConfigError(f'--scorer takes one scorer, whose margin counts; got "{self.scorer}".')
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}.")


def filter_pairs(request: Request, *, command: str = "", console: Console) -> pd.DataFrame:
    """Choose pairs and write them with their components and a report; return selection.parquet's table.

    Raises:
        UserError: unusable data, a part that the method needs and nothing gives, or nothing left to choose.
    """
    how = {"on_error": "skip" if request.skip_broken else "raise", "error_log": request.out / skipped.FILE}
    with held(request.out), skipped.skippable():
        source = open_pairs(request.source, split=request.split, max_samples=request.limit, root=request.root, **how)
        components = _components(source, request, console)
        _require(components, request)
        chosen = _choose(components.table, request)
        _write(source, components.table, chosen, request, command)
    _tell(components, chosen, request, console)
    skipped.tell(source.rejects, console)
    return chosen.table


# -- components ------------------------------------------------------------------------------------------------------


def _components(source: PairSource, request: Request, console: Console) -> Components:
    """Return all parts that are asked for or known; new ones are saved as soon as they are there."""
    memo = request.out / MEMO
    place = str(Path(request.source).resolve()) if Path(request.source).exists() else request.source
    content = json.loads(json.dumps(source.identify(memo), default=str))
    origin = {"source": place, "split": request.split, "content": content}
    path = request.out / COMPONENTS
    components = Components.read(path) if path.exists() else None
    if components is None or components.origin.get("pairs") != origin:
        with progress_bar(len(source), "Reading pairs", True) as advance:
            components = Components.of(source, origin, advance)
        _save(components, path)
    parts: tuple[tuple[str, Any, Callable[..., None]], ...] = (
        ("scores", request.scores or request.scorer, _score),
        ("text_quality", request.text_quality or request.text_quality_model, _rate),
        ("text_entropy", request.text_encoder, _measure),
    )
    for name, wanted, make in parts:
        if wanted is None:
            continue
        made_from = _made_from(name, request, memo)
        if components.origin.get(name) != made_from:
            make(components, request, made_from, console)
            _save(components, path)
        else:
            console.print(f"{name.replace('_', ' ')}: as saved in {path}", markup=False, highlight=False)
    return components


def _made_from(part: str, request: Request, memo: Path) -> dict[str, Any]:
    """Return what a part depends on: hashes of files and weights."""
    if part == "scores" and request.scores:
        return {"file": _digest(request.scores), "scorer": request.scorer}
    if part == "scores":
        [(name, path)] = scorers.parse(request.scorer).items()
        weights, own = scorers.weights_of(name, path, memo), scorers.sources(request.scorer)
        return {"scorer": scorers.name_of(name), "weights": weights} | ({"own_code": own} if own else {})
    if part == "text_quality" and request.text_quality:
        return {"file": _digest(request.text_quality)}
    if part == "text_quality":
        return {"asked": LanguageModelRater(request.text_quality_model, None, None).asked(memo)}
    neighbours = max(KEPT_NEIGHBOURS, request.settings.neighbours)
    return {"encoder": weights_identity(request.text_encoder, memo), "neighbours": neighbours}


def _score(components: Components, request: Request, made_from: dict[str, Any], console: Console) -> None:
    path, scorer = request.scores, request.scorer
    if path is None:
        path, scorer = request.out / SCORES, made_from["scorer"]
        names = ("split", "limit", "root", "skip_broken", "batch_size", "device")
        options = {name: getattr(request, name) for name in names}
        score.score_pairs(request.source, path, [request.scorer], **options, console=console)
    missing = components.set_scores(margin.read_scores(path, scorer), made_from)
    if missing:
        console.print(f"{missing} pairs have no score in {path}: they cannot be ranked by it.", markup=False)


def _rate(components: Components, request: Request, made_from: dict[str, Any], console: Console) -> None:
    prompts = components.prompts()
    if request.text_quality:
        ratings = text_quality.read_qualities(request.text_quality, prompts)
    else:
        device = pick_device(request.device)
        rater = LanguageModelRater(request.text_quality_model, device, pick_dtype("auto", device))
        cache = {"cache": request.out / RATINGS, "asked": made_from["asked"], "batch_size": request.batch_size}
        with progress_bar(len(prompts), "Rating prompts", True) as advance:
            ratings = text_quality.rate(prompts, rater, **cache, advance=advance)
    components.set_quality(ratings, made_from)


def _measure(components: Components, request: Request, made_from: dict[str, Any], console: Console) -> None:
    prompts, device = components.distinct_prompts(), pick_device(request.device)
    encoder = text_entropy.ClipTextEncoder(request.text_encoder, device)
    k = min(made_from["neighbours"], max(len(prompts) - 1, request.settings.neighbours))
    with progress_bar(len(prompts), "Embedding prompts", True) as advance:
        embeddings = encoder(prompts, advance=advance)
    with progress_bar(len(prompts), "Nearest prompts", True) as advance:
        distances = text_entropy.nearest_distances(embeddings, k, device=device, advance=advance)
    components.set_distances(distances, made_from)


def _require(components: Components, request: Request) -> None:
    """Raise DataError when the method needs what is not there."""
    if request.method in baselines.NEEDS_SCORES and "scores" not in components.origin:
        raise DataError(
            f"The method {request.method} needs scores of the pairs. Give --scores FILE (of `diffalign score --pairs`) "
            "or --scorer NAME[=PATH]."
        )
    k = request.settings.neighbours
    if request.method == "fifa" and request.settings.uses_entropy and f"distance_{k}" not in components.table:
        raise DataError(
            f"The method fifa needs the distance of every prompt to its neighbour {k}. Give --text-encoder PATH_OR_ID, "
            "e.g. openai/clip-vit-large-patch14, or leave the term out with --gamma 0."
        )


def _digest(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"There is no file {file}.")
    return digest_files([file])[0]


def _save(components: Components, path: Path) -> None:
    with atomic_write(path) as temporary:
        components.write(temporary)


# -- choice ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Hold which pairs were chosen, why others were not, and by what value."""

    order: NDArray[np.int64]  # indices into the table, the best first
    values: NDArray[np.float64]
    held_out: NDArray[np.bool_]
    counts: dict[str, int]
    table: pd.DataFrame  # example_id, value, rank


def _choose(pairs: pd.DataFrame, request: Request) -> Choice:
    settings = request.settings
    out = cleaning.held_out(pairs["prompt_key"], request.validation, request.seed)
    unique = cleaning.dedupe(pairs) if request.dedupe else cleaning.Deduped(np.ones(len(pairs), bool), 0, 0)
    reasons = _refused(pairs, settings)
    pool, out = unique.keep & ~out, unique.keep & out & ~reasons.get("harmful prompt", np.zeros(len(pairs), bool))
    values = np.full(len(pairs), np.nan)
    values[pool] = baselines.rank(request.method, pairs[pool].reset_index(drop=True), settings, seed=request.seed)
    counts = {"pairs": len(pairs), "repeated": unique.repeated, "contradicted": unique.contradicted}
    counts["held out for validation"] = int(out.sum())
    counts["without a score"] = int((np.isnan(values) & pool).sum())
    for reason, mask in reasons.items():
        counts[reason] = int((mask & pool & ~np.isnan(values)).sum())
        values[mask] = np.nan
    wanted = selection.count_of(request.keep, int(pool.sum())) if pool.any() else 0
    order = selection.select(values, wanted, pairs["prompt_key"], settings.max_per_prompt)
    if not len(order):
        raise UserError(f"Nothing is left to choose from: {counts}. Loosen what leaves pairs out.")
    counts |= {"asked for": wanted, "kept": len(order), "prompts kept": pairs["prompt_key"].iloc[order].nunique()}
    table = pairs[["example_id"]].iloc[order].assign(value=values[order], rank=np.arange(1, len(order) + 1))
    return Choice(order, values, out, counts, table.reset_index(drop=True))


def _refused(pairs: pd.DataFrame, settings: ImportanceSettings) -> dict[str, NDArray[np.bool_]]:
    """Return by reason which pairs [N] may not be chosen whatever their value."""
    reasons: dict[str, NDArray[np.bool_]] = {}
    if "text_quality" in pairs:
        reasons["harmful prompt"] = (pairs["text_quality_flag"] == text_quality.HARMFUL).to_numpy()
        if settings.min_text_quality is not None:
            reasons["low text quality"] = (pairs["text_quality"] < settings.min_text_quality).to_numpy()
    elif settings.min_text_quality is not None:
        raise DataError("--min-text-quality needs ratings. Give --text-quality FILE or --text-quality-model.")
    if settings.require_agreement:
        if "score_chosen" not in pairs:
            raise DataError("--require-agreement needs scores. Give --scores FILE or --scorer NAME[=PATH].")
        reasons["scorer contradicts the label"] = (pairs["score_chosen"] < pairs["score_rejected"]).to_numpy()
    return reasons


# -- results ---------------------------------------------------------------------------------------------------------


def _write(source: PairSource, pairs: pd.DataFrame, chosen: Choice, request: Request, command: str) -> None:
    files = [(TRAIN, chosen.order)]
    if chosen.held_out.any():
        files.append((VALIDATION, np.flatnonzero(chosen.held_out)))
    else:  # one of an earlier choice would hold prompts that are now trained on
        (request.out / VALIDATION).unlink(missing_ok=True)
    for name, indices in files:
        with progress_bar(len(indices), f"Writing {name}", True) as advance:
            with atomic_write(request.out / name) as temporary:
                writing.write_pairs(source, pairs, indices, temporary, advance)
    tables.write(chosen.table, request.out / SELECTION)
    how = {"method": request.method, "settings": request.settings, "counts": chosen.counts, "command": command}
    content = report.page(source, pairs, chosen.order, chosen.values, **how)
    with atomic_write(request.out / REPORT) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _tell(components: Components, chosen: Choice, request: Request, console: Console) -> None:
    table = tables.plain("of a pair", "mean before", "mean after")
    for item in report.distributions(components.table, chosen.order, request.settings):
        after = f"{item.after.mean():.4g}" if len(item.after) else ""
        table.add_row(item.name, f"{item.before.mean():.4g}", after)
    console.print(table)
    counts = ", ".join(f"{number:,} {name}" for name, number in chosen.counts.items() if number)
    console.print(f"{request.source}: {counts}.", markup=False, highlight=False, soft_wrap=True)
    if request.method == "fifa" and request.settings.alpha > 0 and "text_quality" not in components.origin:
        console.print("Text quality is left out: no --text-quality or --text-quality-model.", markup=False)
    agreement = Agreement.of(components.table, chosen.order)
    if agreement and (warning := agreement.warning(request.method, request.settings)):
        skipped.say(f"Warning: {warning}", console)
    console.print(f"Train on it with data.train_data_dir={request.out}. Report: {request.out / REPORT}", markup=False)
