"""`diffalign grid`: the same prompts and the same noise through several models, side by side."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from diffalign.backbones.adapters import active_adapters, adapter_mix
from diffalign.backbones.families import adapted
from diffalign.errors import UserError
from diffalign.evaluation import Look, SamplingSettings, generate_to, save_pages, score_table
from diffalign.evaluation.fonts import missing_glyphs
from diffalign.evaluation.grid import check_suffix
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.grid_columns import Column, Sweep, checkpoints_of, swept
from diffalign.jobs.drawing.negative import Negative, loader

Rows = Sequence[tuple[str, int]]  # prompt and seed


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
    checkpoints: bool = False,
    sweep: str | None = None,
    load_judges: Callable[[], Sequence[Any]] = tuple,
    look: Look | None = None,
    torch_dtype: str = "auto",
    device: str = "auto",
    console: Console,
) -> pd.DataFrame | None:
    """Draw prompts and seeds down and models across, with scores below each picture; return the scores.

    Pictures lie on the disk until their page is painted, so the length of a grid is not bound by memory.

    Args:
        load_judges: returns the scorers; called once the models and the figure are known to be right.

    Raises:
        UserError: a figure that cannot be written as asked, found before anything is drawn.
    """
    check_suffix(out)
    found = columns(checkpoints_of(specs) if checkpoints else specs, base, show_base, base_is_used=negative is not None)
    wanted = swept(found, settings, Sweep.parse(sweep) if sweep else None)
    if negative is not None:
        negative.check(min(column.settings.guidance_scale for column in wanted), found)
    if lacking := missing_glyphs(look.font if look else None, [*prompts, *(column.name for column in wanted)]):
        console.print(f"{lacking} --font FILE sets the grid in one.", markup=False, highlight=False, soft_wrap=True)
    drawing = loader(negative, base, torch_dtype, device)
    judges = load_judges()
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    names = [column.name for column in wanted]
    with tempfile.TemporaryDirectory(prefix="diffalign-grid-") as folder:
        pictures = draw(wanted, rows, Path(folder), drawing, console)
        scores = _score(pictures, rows, judges) if judges else None
        files = save_pages(
            out,
            [f"seed {seed}" for _, seed in rows],
            names,
            [[pictures[name][row] for name in names] for row in range(len(rows))],
            [prompt for prompt, _ in rows],
            None if scores is None else _by_cell(scores, names, len(rows)),
            look=look,
        )
    said = f"{out}" if len(files) == 1 else f"{len(files)} pages, {files[0]} to {files[-1]}"
    console.print(f"{len(rows)} rows of {len(names)} pictures: {said}", markup=False, highlight=False)
    return scores


def subtitle(settings: SamplingSettings, sweep: str | None, negative: Negative | None) -> str:
    """Return what all pictures of a grid have in common, but for what is swept."""
    swept_setting = sweep.partition("=")[0] if sweep else ""
    parts = [
        f"{settings.num_inference_steps} steps" if swept_setting != "steps" else "",
        f"guidance {settings.guidance_scale:g}" if swept_setting != "guidance_scale" else "",
        f"negative branch {negative.spec}" if negative else "",
        "same noise along a row",
    ]
    return ", ".join(part for part in parts if part)


def draw(
    wanted: Sequence[Column], rows: Rows, folder: Path, loader: models.ModelLoader, console: Console
) -> dict[str, list[Path]]:
    """Return the picture files of every column by its name, loading a base or a model that several share once."""
    files: dict[str, list[Path]] = {}
    for base in dict.fromkeys(column.model.base for column in wanted):
        for model in dict.fromkeys(column.model for column in wanted if column.model.base == base):
            console.print(f"Drawing with {model.name}", markup=False, highlight=False)
            loaded = loader.load(model)
            for column in (column for column in wanted if column.model == model):
                with _scaled(loaded, column.lora_scale):
                    manifest = generate_to(
                        folder / str(len(files)),
                        loaded.pipeline,
                        *map(list, zip(*rows, strict=True)),
                        column.settings,
                        identity=column.name,
                        prompt_ids=range(len(rows)),
                    )
                files[column.name] = manifest.paths
    return files


def _scaled(loaded: models.LoadedModel, scale: float) -> ExitStack:
    """Return a context in which the LoRA acts times `scale`, that of text encoders too."""
    entered = ExitStack()
    if scale == 1:
        return entered
    networks = adapted(loaded.pipeline)
    if not networks:
        raise UserError(f"--sweep lora_scale has no effect on {loaded.name}: it is no LoRA. Leave it out.")
    for network in networks:
        entered.enter_context(adapter_mix(network, dict.fromkeys(active_adapters(network), scale))())
    return entered


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


def _score(pictures: dict[str, list[Path]], rows: Rows, judges: Sequence[Any]) -> pd.DataFrame:
    prompts, seeds = map(list, zip(*rows, strict=True))
    parts = [score_table(images, prompts, judges, model=name, seed=seeds) for name, images in pictures.items()]
    return pd.concat(parts, ignore_index=True)


def _by_cell(scores: pd.DataFrame, names: Sequence[str], rows: int) -> list[list[dict[str, float]]]:
    """Return [row][column] scorer -> score; a table of one scorer and model is in the order of the rows."""
    columns = {key: part["score"].tolist() for key, part in scores.groupby(["model", "scorer"], sort=False)}
    judges = list(scores["scorer"].unique())
    return [[{judge: columns[name, judge][row] for judge in judges} for name in names] for row in range(rows)]
