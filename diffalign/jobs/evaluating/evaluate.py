"""`diffalign evaluate`: several models, one prompt set, the same noise; who wins, by how much, and how sure that is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation import (
    Evaluation,
    Manifest,
    SamplingSettings,
    attribute_table,
    generate_to,
    score_table,
    write_report,
)
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.evaluation.published import Beside
from diffalign.evaluation.results import Bootstrap
from diffalign.evaluation.scoring import format_score
from diffalign.evaluation.verdict import p_text
from diffalign.jobs.drawing import grid, models
from diffalign.jobs.evaluating import protocols, published
from diffalign.jobs.scoring import scorers as scoring
from diffalign.jobs.scoring import tables
from diffalign.jobs.scoring.own_pictures import Folder
from diffalign.jobs.training.train import versions
from diffalign.yaml_text import read_yaml

STRIDE = 1_000_000  # between the seeds of neighbouring prompts
NOISES = ("own", "shared")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Say what is to be evaluated, and how."""

    specs: Sequence[str]  # models, or folders of pictures drawn by `diffalign generate`
    prompts: PromptSet
    seeds: Sequence[int]
    scorers: Sequence[str]  # may be empty where a protocol judges
    out: Path
    settings: SamplingSettings
    baseline: str | None = None  # a name of the models; None: the first
    base: str | None = None  # the model that LoRAs and UNets go on
    own: Mapping[str, Manifest] | None = None  # what `compared_as_they_are` found, in place of `specs`
    show_base: bool = False  # add the base of the first LoRA or UNet, as the first model
    noise: str = "own"  # every prompt its own, or the same for all
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    gallery_size: int = 96
    protocol: str | None = None  # geneval, dpg or hps: a benchmark with rules of its own
    judge: str = protocols.ORACLE  # of geneval and dpg: the detector or answerer
    torch_dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raise UserError for what can be known to be wrong before anything is drawn."""
        if self.protocol:
            protocols.check(self.protocol, self.prompts, self.scorers, self.seeds)
        if self.scorers or self.protocol not in protocols.JUDGED:
            scoring.parse(self.scorers)
        if self.gallery_size < 0:
            raise UserError(f"--gallery must not be negative, got {self.gallery_size}. 0 leaves the pictures out.")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds repeats one: {', '.join(map(str, self.seeds))}. Every picture needs another.")
        if self.noise not in NOISES:
            raise UserError(f'--noise must be one of {", ".join(NOISES)}, got "{self.noise}".')
        if self.noise == "own" and max(self.seeds) >= STRIDE:
            raise UserError(
                f"With a noise of its own for every prompt, seeds lie below {STRIDE}; got {max(self.seeds)}."
            )

    @property
    def pictures(self) -> pd.DataFrame:
        """prompt_id, prompt and seed of every picture a model draws."""
        step = STRIDE if self.noise == "own" else 0
        table = self.prompts.table[["prompt_id", "prompt"]]
        rows = [
            (row.prompt_id, row.prompt, seed + step * row.prompt_id)
            for row in table.itertuples()
            for seed in self.seeds
        ]
        return pd.DataFrame(rows, columns=["prompt_id", "prompt", "seed"])


def evaluate(request: Request, *, command: str = "", console: Console) -> Evaluation:
    """Draw what is missing, score everything, write scores, summaries and reports into `request.out`.

    Run again after an interruption it draws only the pictures that are missing; with more scorers, none.

    Raises:
        UserError: models or scorers that do not exist, an unknown baseline.
        DataError: folders of pictures that are not comparable.
    """
    columns = _columns(request)
    names = [column.name for column in columns]
    baseline = request.baseline or names[0]
    if baseline not in names:
        raise UserError(f'--baseline "{baseline}" is none of {", ".join(names)}.{suggestion(baseline, names)}')
    if len(names) < 2:
        raise UserError(f"There is only {names[0]}: name at least one more model, or add its base with --show-base.")
    examiner = protocols.examiner(request.protocol, request.prompts, request.judge)
    manifests = dict(request.own) if request.own else _draw(columns, request, console)
    for name in names[1:]:
        manifests[names[0]].require_comparable(manifests[name])
    result = _score(manifests, baseline, request, examiner)
    extra = {"prompt_set": request.prompts.name, "models_drawn": {n: m.identity for n, m in manifests.items()}}
    extra |= {"seeds": list(request.seeds), "noise": request.noise, "versions": versions(), "command": command}
    extra |= protocols.hps(result, request.prompts, request.seeds, request.out, console)
    extra |= protocols.write(examiner, request.seeds, request.out, console)
    reported, numbers = published.beside(result, request.prompts, extra, console)
    result.write(request.out, extra | numbers)
    _report(result, manifests, columns, request, command, reported)
    console.print(summary(result))
    for comparison in result.comparisons.values():  # the headlines of the pages
        console.print(comparison.describe(comparison.scorers[0]), markup=False, highlight=False)
    console.print(f"Look at {request.out}/report.html and {request.out}/summary.md.", markup=False, highlight=False)
    return result


def summary(result: Evaluation) -> Table:
    """Return the table for the terminal: one row per model and scorer."""
    table = tables.plain("model", "scorer", "mean", "median", "win rate", f"{result.bootstrap.level:.0%} interval", "p")
    for scorer, row in next(iter(result.comparisons.values())).results.items():
        table.add_row(result.baseline, scorer, format_score(row.base), format_score(row.base_median), "", "", "")
    for row in result.table.itertuples():
        interval = "n/a" if pd.isna(row.ci_low) else f"{100 * row.ci_low:.1f} to {100 * row.ci_high:.1f}%"
        scores = format_score(row.mean), format_score(row.median)
        rate = f"{100 * row.win_rate:.1f}%"
        table.add_row(row.model, row.scorer, *scores, rate, interval, p_text(row.p_value_holm))
    return table


@dataclass(frozen=True)
class _Column:
    """One model of the evaluation: to be drawn, or a folder of pictures."""

    name: str
    model: models.Model | None
    folder: Path


def _columns(request: Request) -> list[_Column]:
    """Return the models in the order given; folders of pictures stay what they are."""
    if request.own:
        return [_Column(name, None, manifest.directory) for name, manifest in request.own.items()]
    drawn = {spec: folder for spec in request.specs if (folder := _pictures_folder(spec))}
    specs = [spec for spec in request.specs if spec not in drawn]
    wanted = iter(grid.columns(specs, request.base, request.show_base, base_is_used=False) if specs else [])
    if not specs and (request.show_base or request.base):
        raise UserError("--base and --show-base have no effect: all that is named are folders of pictures.")
    slots = ([None] if request.show_base else []) + list(request.specs)
    columns = []
    for spec in slots:
        if spec in drawn:
            name, folder = drawn[spec]
            columns.append(_Column(name, None, folder))
        else:
            model = next(wanted)
            columns.append(_Column(model.name, model, request.out / "images" / slug(model.name)))
    for key, what in (([c.name for c in columns], "named"), ([c.folder for c in columns], "kept in")):
        if twice := [str(value) for value in key if key.count(value) > 1]:
            raise UserError(f'Two models are {what} "{twice[0]}". Name them apart: first=PATH second=PATH.')
    return columns


def _pictures_folder(spec: str) -> tuple[str, Path] | None:
    """Return name and folder of pictures drawn before, or None if `spec` is a model."""
    folder = Folder.of(spec)
    if folder and not folder.has_manifest:
        raise UserError(
            f"{folder.path} holds pictures of your own. Name only such folders and leave out --prompts: what they show "
            "stands beside the pictures."
        )
    return (folder.name, folder.path) if folder and folder.has_manifest else None


def slug(name: str) -> str:
    """Return a model's name as the name of a folder or file."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def _draw(columns: Sequence[_Column], request: Request, console: Console) -> dict[str, Manifest]:
    """Return the pictures of every model, a base that several share loaded once."""
    pictures = request.pictures
    manifests = {c.name: _drawn_before(c.folder, pictures) for c in columns if c.model is None}
    loader = models.ModelLoader(request.torch_dtype, request.device)
    todo = [column for column in columns if column.model is not None]
    for base in dict.fromkeys(column.model.base for column in todo):
        for column in (column for column in todo if column.model.base == base):
            console.print(f"Drawing with {column.name}", markup=False, highlight=False)
            loaded = loader.load(column.model)
            manifests[column.name] = generate_to(
                column.folder,
                loaded.pipeline,
                pictures["prompt"].tolist(),
                pictures["seed"].tolist(),
                request.settings,
                identity=loaded.identity,
                prompt_ids=pictures["prompt_id"].tolist(),
            )
    return {column.name: manifests[column.name] for column in columns}


def _drawn_before(folder: Path, pictures: pd.DataFrame) -> Manifest:
    """Return those pictures of a folder that are asked for; raise DataError if one is not there."""
    manifest = Manifest.read(folder)
    keys = ["prompt_id", "seed"]
    table = pictures.merge(manifest.table, on=keys, how="left", suffixes=("", "_drawn"))
    if missing := int(table["file"].isna().sum()):
        row = table[table["file"].isna()].iloc[0]
        raise DataError(
            f"{folder} lacks {missing} of {len(table)} pictures, the first is prompt {row.prompt_id} with seed "
            f"{row.seed}. Give the --prompts and --seeds it was drawn with, and --noise shared if `diffalign generate` "
            "drew it."
        )
    if (changed := table["prompt"] != table["prompt_drawn"]).any():
        row = table[changed].iloc[0]
        raise DataError(f"Prompt {row.prompt_id} is {row.prompt!r}, but in {folder} it is {row.prompt_drawn!r}.")
    return replace(manifest, table=table[["prompt_id", "prompt", "seed", "file"]])


def _score(
    manifests: Mapping[str, Manifest], baseline: str, request: Request, examiner: protocols.Examiner | None
) -> Evaluation:
    judges = scoring.load(request.scorers, request.device) if request.scorers else []
    scores, attributes = [], []
    for name, manifest in manifests.items():
        what = manifest.paths, manifest.prompts, judges
        if judges:
            scores.append(score_table(*what, model=name, progress=True, **manifest.columns))
            attributes.append(attribute_table(*what, model=name, **manifest.columns))
        if examiner is not None:
            scores.append(examiner.examine(name, manifest))
    known = [table for table in attributes if table is not None]
    kinds = request.prompts.categories
    return Evaluation(
        scores=pd.concat(scores, ignore_index=True),
        baseline=baseline,
        attributes=pd.concat(known, ignore_index=True) if known else None,
        categories=request.prompts.table[["prompt_id", *kinds]] if kinds else None,
        bootstrap=request.bootstrap,
        settings=manifests[baseline].settings,
    )


def _report(
    result: Evaluation,
    manifests: Mapping[str, Manifest],
    columns: Sequence[_Column],
    request: Request,
    command: str,
    reported: Sequence[Beside],
) -> None:
    """Write report.html about the first model compared, and a page for each further one."""
    first = result.models[0]
    pages = {name: "report.html" if name == first else f"report-{slug(name)}.html" for name in result.models}
    weights = {column.name: column.model and column.model.weights for column in columns}
    for name, page in pages.items():
        write_report(
            request.out / page,
            result.comparisons[name],
            {model: manifests[model].images for model in (result.baseline, name)},
            **_training(weights[name]),
            command=command,
            gallery_size=request.gallery_size,
            evaluation=result,
            pages=pages,
            published=reported,
        )


def _training(weights: str | None) -> dict[str, Any]:
    """Return metrics and configuration of the run that left these weights, as far as they are there."""
    run = models.run_of(Path(weights)) if weights else None
    if run is None:
        return {}
    metrics = run / "metrics.jsonl"
    config = read_yaml(run / models.RUN_FILE)
    return {"metrics": metrics if metrics.is_file() else None, "config": config}
