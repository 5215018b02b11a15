"""`diffalign grid`: the same prompts and the same noise through several models, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from rich.console import Console

from diffalign.errors import UserError
from diffalign.evaluation import SamplingSettings, comparison_grid, generate, save_grid, score_table
from diffalign.jobs import models, tables
from diffalign.jobs import scorers as scoring
from diffalign.jobs.negative import Negative, loader

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_ROWS = 200


def grid(
    specs: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    settings: SamplingSettings,
    *,
    base: str | None = None,
    negative: Negative | None = None,
    show_base: bool = False,
    scorers: Sequence[str] = (),
    title: str = "",
    torch_dtype: str = "auto",
    device: str = "auto",
    console: Console,
) -> pd.DataFrame | None:
    """Draw prompts and seeds down and models across, with scores below each picture; return the scores.

    Raises:
        UserError: a figure that cannot be written as asked, found before anything is drawn.
    """
    _check_figure(out, len(prompts) * len(seeds))
    wanted = columns(specs, base, show_base, base_is_used=negative is not None)
    if negative is not None:
        negative.check(settings.guidance_scale, wanted)
    drawing = loader(negative, base, torch_dtype, device)
    judges = scoring.load(scorers, device) if scorers else []
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures = draw(wanted, rows, settings, drawing, console)
    scores = _score(pictures, rows, judges) if judges else None
    names = [model.name for model in wanted]
    figure = comparison_grid(
        [f"seed {seed}" for _, seed in rows],
        names,
        [[pictures[name][row] for name in names] for row in range(len(rows))],
        [prompt for prompt, _ in rows],
        None if scores is None else _by_cell(scores, names, len(rows)),
        title=title,
        subtitle=f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}"
        f"{f', negative branch {negative.spec}' if negative else ''}, same noise along a row",
    )
    save_grid(figure, out)
    if scores is not None:
        console.print(tables.means(scores))
    console.print(f"{len(rows)} rows of {len(names)} pictures: {out}", markup=False, highlight=False)
    return scores


def draw(
    wanted: Sequence[models.Model],
    rows: Sequence[tuple[str, int]],
    settings: SamplingSettings,
    loader: models.ModelLoader,
    console: Console,
) -> dict[str, list[Image.Image]]:
    """Return the pictures of every model by its name, loading a base that several share once."""
    pictures: dict[str, list[Image.Image]] = {}
    for base in dict.fromkeys(model.base for model in wanted):
        for model in (model for model in wanted if model.base == base):
            console.print(f"Drawing with {model.name}", markup=False, highlight=False)
            pipeline = loader.load(model).pipeline
            pictures[model.name] = generate(pipeline, *map(list, zip(*rows, strict=True)), settings)
    return pictures


def _check_figure(out: Path, rows: int) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f'Cannot write a grid as "{out}": expected a name ending in {", ".join(SUFFIXES)}.')
    if rows > MAX_ROWS:
        raise UserError(
            f"A grid of {rows} rows (prompts x seeds) is no figure any more; {MAX_ROWS} is the most. Use --limit, "
            "fewer seeds, or `diffalign generate` for many pictures."
        )


def columns(specs: Sequence[str], base: str | None, show_base: bool, base_is_used: bool) -> list[models.Model]:
    """Return the models that a command line names, and before them the base of the first LoRA or UNet if asked for."""
    wanted = models.resolve(specs, base, base_is_used=base_is_used)
    if not show_base:
        return wanted
    first = next((model for model in wanted if model.weights is not None), None)
    if first is None:
        raise UserError(f"--show-base has no effect: {', '.join(specs)} has no base model below it. Leave it out.")
    if any(model.name == "base" for model in wanted):
        raise UserError('--show-base adds a column named "base", and one of the models is called so. Name it: x=PATH.')
    return [models.base_of(first), *wanted]


def _score(
    pictures: dict[str, list[Image.Image]], rows: Sequence[tuple[str, int]], judges: Sequence[Any]
) -> pd.DataFrame:
    prompts, seeds = map(list, zip(*rows, strict=True))
    parts = [score_table(images, prompts, judges, model=name, seed=seeds) for name, images in pictures.items()]
    return pd.concat(parts, ignore_index=True)


def _by_cell(scores: pd.DataFrame, names: Sequence[str], rows: int) -> list[list[dict[str, float]]]:
    """Return [row][column] scorer -> score; a table of one scorer and model is in the order of the rows."""
    columns = {key: part["score"].tolist() for key, part in scores.groupby(["model", "scorer"], sort=False)}
    judges = list(scores["scorer"].unique())
    return [[{judge: columns[name, judge][row] for judge in judges} for name in names] for row in range(rows)]
