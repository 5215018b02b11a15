"""A figure to show others: prompts down, models across, the same seed along a row."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import DataError, UserError
from diffalign.evaluation.comparison import Comparison, pick_prompts
from diffalign.evaluation.fonts import fitting_font
from diffalign.evaluation.gallery import Images, find_image
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.scoring import ImageLike, open_image
from diffalign.evaluation.typesetting import THEMES, Layout, Painter, load_font

Scores = Sequence[Sequence[Mapping[str, float]]]

SAVE_OPTIONS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    ".png": ("PNG", {}, None),
    ".jpg": ("JPEG", {"quality": 92, "subsampling": 0}, 65_500),
    ".jpeg": ("JPEG", {"quality": 92, "subsampling": 0}, 65_500),
    ".webp": ("WEBP", {"quality": 90, "method": 4}, 16_383),
    ".pdf": ("PDF", {"quality": 92, "resolution": 150.0}, None),
}
SUFFIXES = tuple(SAVE_OPTIONS)


def comparison_grid(
    rows: Sequence[str],
    columns: Sequence[str],
    images: Sequence[Sequence[ImageLike]],
    captions: Sequence[str],
    scores: Scores | None = None,
    *,
    title: str = "",
    subtitle: str = "",
    cell: int | None = None,
    theme: str = "light",
    font: str | Path | None = None,
) -> Image.Image:
    """Return a figure of R prompts down and K models across.

    Under each picture stand its scores; the best of a row is marked, and the frame goes to the winner by the first
    scorer. Equal scores are not marked.

    Args:
        rows: [R] short labels below the captions, e.g. "seed 3"; "" for none.
        columns: [K] the names of the models.
        images: [R][K] pictures or files.
        captions: [R] the prompts, wrapped and at most as tall as the picture.
        scores: [R][K] scorer name to score, the same scorers everywhere.
        title: set above the figure; `subtitle` below it in smaller type.
        cell: side of a picture in pixels, >= 64. By default small pictures grow by a whole factor to about 384, and
            large ones shrink to 512.
        theme: "light" or "dark".
        font: a TrueType file; by default DejaVu Sans, or an installed font that has what DejaVu Sans lacks, such as
            Chinese (`fonts.missing_glyphs` says what no font has).

    Raises:
        DataError: for lists whose lengths do not fit together or pictures that cannot be read.
    """
    check_lengths(rows, columns, images, captions, scores)
    pictures = [[open_image(image) for image in line] for line in images]
    cell = cell or default_cell(max(picture.width for line in pictures for picture in line))
    names = list(scores[0][0]) if scores else []
    font = fitting_font(font and str(font), [*captions, *columns, title, subtitle])
    layout = layout_of(cell, len(columns), len(names), title, subtitle, theme, font)
    heights = [max(picture.height * cell // picture.width for picture in line) for line in pictures]
    tops = list(
        accumulate((height + layout.below_picture + layout.row_gap for height in heights), initial=layout.first_row)
    )
    canvas = Image.new("RGB", (layout.width, tops[-1] - layout.row_gap + layout.margin), layout.theme.background)
    painter = Painter(canvas, layout)
    painter.heading(columns)
    for index, line in enumerate(pictures):
        painter.caption(captions[index], rows[index], tops[index], heights[index])
        _paint_row(painter, layout, line, scores[index] if scores else (), tops[index], heights[index])
    return canvas


def _paint_row(
    painter: Painter,
    layout: Layout,
    line: Sequence[Image.Image],
    scores: Sequence[Mapping[str, float]],
    top: int,
    height: int,
) -> None:
    """Paint the pictures [K] of a row and, if there are any, their scores [K], winners marked."""
    names = list(scores[0]) if scores else []
    winners = _winners(scores, names)
    for column, picture in enumerate(line):
        left = layout.column_left(column)
        painter.picture(picture, left, top, framed=bool(names) and winners[names[0]] == column)
        for number, name in enumerate(names):
            baseline = top + height + layout.score_top(number)
            painter.score(name, scores[column][name], left, baseline, won=winners[name] == column)


def grid_of(
    comparison: Comparison,
    images: Images,
    *,
    count: int = 8,
    how: str = "spread",
    scorer: str | None = None,
    **options: Any,
) -> Image.Image:
    """Return the grid of a comparison: base and aligned model for `count` prompts, the first seed of each.

    Args:
        comparison: the scores.
        images: model name -> (prompt_id, seed) -> file or picture.
        count: prompts at most, chosen by `pick_prompts` with `how`; "spread" shows losses as well as wins.
        scorer: the one to choose by, whose winners are framed; by default the first.
        options: passed to `comparison_grid`; without a subtitle the win rate is set there.
    """
    scorer = scorer or comparison.scorers[0]
    chosen = pick_prompts(comparison, scorer, count, how)
    models = [comparison.base_name, comparison.aligned_name]
    ordered = [scorer, *(name for name in comparison.scorers if name != scorer)]
    by_prompt = {prompt_id: rows for prompt_id, rows in comparison.pairs.groupby("prompt_id") if prompt_id in chosen}
    seeds = [int(by_prompt[prompt_id]["seed"].iloc[0]) for prompt_id in chosen]
    captions, scores = [], []
    for prompt_id, seed in zip(chosen, seeds, strict=True):
        rows = by_prompt[prompt_id]
        rows = rows[rows["seed"] == seed].set_index("scorer").loc[ordered]
        captions.append(rows["prompt"].iloc[0])
        scores.append([rows["base"].to_dict(), rows["aligned"].to_dict()])
    result = comparison.results[scorer]
    if "subtitle" not in options:
        options["subtitle"] = f"{scorer} win rate {result.win_rate:.1%} on {result.n_prompts} prompts"
        if result.n_prompts > 1:
            level = f"{comparison.bootstrap.level:.0%}"
            options["subtitle"] += f", {level} interval {result.ci_low:.1%} to {result.ci_high:.1%}"
    pictures = [[find_image(images, model, key) for model in models] for key in zip(chosen, seeds, strict=True)]
    return comparison_grid([f"seed {seed}" for seed in seeds], models, pictures, captions, scores, **options)


def save_grid(grid: Image.Image, file: str | Path) -> Path:
    """Write the figure as PNG, JPEG, WebP or PDF by the suffix of `file`; raise UserError if that cannot hold it."""
    file = Path(file)
    check_suffix(file)
    kind, _, limit = SAVE_OPTIONS[file.suffix.lower()]
    if limit and max(grid.size) > limit:
        raise UserError(f"{kind} holds at most {limit} pixels a side, the grid has {max(grid.size)}. Use .png.")
    with atomic_write(file) as temporary:
        encode(grid, temporary, file.suffix.lower())
    return file


def check_suffix(file: Path) -> None:
    """Raise UserError unless a grid can be written as `file`."""
    if file.suffix.lower() not in SAVE_OPTIONS:
        raise UserError(f'Cannot write a grid as "{file.suffix}". Use {", ".join(SAVE_OPTIONS)}.')


def encode(grid: Image.Image, file: Path, suffix: str, append: bool = False) -> None:
    """Write a figure in the format of a suffix; `append` adds a page to a PDF that is there."""
    kind, options, _ = SAVE_OPTIONS[suffix]
    grid.save(file, format=kind, **options, **({"append": True} if append else {}))


def layout_of(
    cell: int, columns: int, scorers: int, title: str, subtitle: str, theme: str, font: str | Path | None
) -> Layout:
    """Return the measures of a grid; raise UserError for a theme or cell that cannot be."""
    check_look(cell, theme, font)
    return Layout(cell, columns, scorers, title, subtitle, THEMES[theme], str(font) if font else None)


def check_look(cell: int | None, theme: str, font: str | Path | None) -> None:
    """Raise UserError for a theme, cell or font that no grid can have."""
    if theme not in THEMES:
        raise UserError(f'Unknown theme "{theme}". Available: {", ".join(THEMES)}.')
    if cell is not None and cell < 64:
        raise UserError(f"A cell of the grid must be at least 64 pixels, got {cell}. 256 is usual.")
    if font:
        load_font(str(font), bold=False, size=16)


def _winners(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, int | None]:
    """Return by scorer the column of its single best score, or None where the best is shared."""
    winners: dict[str, int | None] = {}
    for name in names:
        values = [cell[name] for cell in scores]
        best = max(values)
        winners[name] = values.index(best) if values.count(best) == 1 and len(values) > 1 else None
    return winners


def default_cell(side: int) -> int:
    """Return how wide a cell is for pictures `side` pixels wide."""
    return min(512, side * max(1, round(384 / side)))


def check_lengths(
    rows: Sequence[str],
    columns: Sequence[str],
    images: Sequence[Sequence[ImageLike]],
    captions: Sequence[str],
    scores: Scores | None,
) -> None:
    """Raise DataError for lists whose lengths do not fit together."""
    if not rows or not columns:
        raise DataError(f"A grid needs at least one row and column, got {len(rows)} rows and {len(columns)} columns.")
    for name, table in (("images", images), ("scores", scores)):
        if table is None:
            continue
        widths = sorted({len(line) for line in table})
        if len(table) != len(rows) or widths != [len(columns)]:
            raise DataError(
                f"The grid has {len(rows)} rows of {len(columns)}, but {name} has {len(table)} rows of "
                f"{' or '.join(map(str, widths))}. Pass one entry per row and column."
            )
    if len(captions) != len(rows):
        raise DataError(f"The grid has {len(rows)} rows but {len(captions)} captions. Pass one per row.")
    if scores and len({tuple(cell) for line in scores for cell in line}) > 1:
        raise DataError(
            "The scores of a grid name different scorers. Give every picture the same scorers in one order."
        )
