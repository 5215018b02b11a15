"""Grids of any length: written page by page, with one page in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from diffalign.errors import DataError
from diffalign.evaluation.grid import (
    SAVE_OPTIONS,
    Scores,
    check_lengths,
    check_look,
    check_suffix,
    comparison_grid,
    default_cell,
    encode,
    layout_of,
    save_grid,
)
from diffalign.evaluation.scoring import ImageLike
from diffalign.evaluation.typesetting import Layout
from reward_models.pictures import PictureError, size

PAGE_PIXELS = 48_000_000  # of one page: what is in memory at a time, at 3 bytes each
_PAPER = 2**0.5  # height over width of a PDF's page


@dataclass(frozen=True, kw_only=True)
class Look:
    """Say how the pages of a grid look; see `comparison_grid`.

    Raises:
        UserError: an unknown theme, a cell below 64 pixels or a font that cannot be read.
    """

    title: str = ""
    subtitle: str = ""
    cell: int | None = None
    theme: str = "light"
    font: str | None = None

    def __post_init__(self) -> None:
        check_look(self.cell, self.theme, self.font)


def save_pages(
    file: str | Path,
    rows: Sequence[str],
    columns: Sequence[str],
    images: Sequence[Sequence[ImageLike]],
    captions: Sequence[str],
    scores: Scores | None = None,
    *,
    look: Look | None = None,
    page_pixels: int = PAGE_PIXELS,
) -> list[Path]:
    """Write a grid of any length and return its files.

    A grid that fits one page is `file` itself; a longer one is the pages of one PDF, or file-1.png, file-2.png, ...

    Args:
        file: .png, .jpg, .webp or .pdf.
        rows: [R] labels; `columns` [K], `captions` [R] and `scores` [R][K] as of `comparison_grid`.
        images: [R][K] files, opened when their page is painted.
        look: title, size of the cells, colours.
        page_pixels: of a page at most, unless a single row is larger.
    """
    file, look = Path(file), look or Look()
    check_suffix(file)
    check_lengths(rows, columns, images, captions, scores)
    sizes = [_sizes(line) for line in images]
    look = replace(look, cell=look.cell or default_cell(max(width for line in sizes for width, _ in line)))
    heights = [max(height * look.cell // width for width, height in line) for line in sizes]
    pages = _pages(file, heights, _layout(look, len(columns), len(scores[0][0]) if scores else 0), page_pixels)
    names = _names(file, len(pages))
    for number, page in enumerate(pages):
        parts = rows[page], columns, images[page], captions[page], scores[page] if scores else None
        grid = comparison_grid(*parts, **vars(_numbered(look, number, len(pages))))
        if len(names) == len(pages):
            save_grid(grid, names[number])
        else:
            encode(grid, _unfinished(file), file.suffix.lower(), append=number > 0)
    if len(names) < len(pages):
        _unfinished(file).replace(file)
    return names


def _layout(look: Look, columns: int, scorers: int) -> Layout:
    subtitle = look.subtitle or "page"
    return layout_of(look.cell, columns, scorers, look.title, subtitle, look.theme, look.font)


def _numbered(look: Look, number: int, pages: int) -> Look:
    if pages == 1:
        return look
    said = (look.subtitle, f"page {number + 1} of {pages}")
    return replace(look, subtitle=", ".join(text for text in said if text))


def _pages(file: Path, heights: Sequence[int], layout: Layout, page_pixels: int) -> list[slice]:
    """Return which rows are on each page: as many as fit, at least one."""
    limit = SAVE_OPTIONS[file.suffix.lower()][2]
    tallest = min(page_pixels // layout.width, limit or page_pixels)
    if file.suffix.lower() == ".pdf":
        tallest = min(tallest, round(_PAPER * layout.width))
    room = tallest - layout.first_row - layout.margin
    pages, start, used = [], 0, 0
    for row, height in enumerate(heights):
        needed = height + layout.below_picture + layout.row_gap
        if row > start and used + needed > room:
            pages.append(slice(start, row))
            start, used = row, 0
        used += needed
    return [*pages, slice(start, len(heights))]


def _names(file: Path, pages: int) -> list[Path]:
    if pages == 1 or file.suffix.lower() == ".pdf":
        return [file]
    digits = len(str(pages))
    return [file.with_stem(f"{file.stem}-{number:0{digits}d}") for number in range(1, pages + 1)]


def _unfinished(file: Path) -> Path:
    """Return where a PDF of several pages grows until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f".{file.name}.part")


def _sizes(line: Sequence[ImageLike]) -> list[tuple[int, int]]:
    """Return the sizes of a row's pictures; of files only their heads are read."""
    sizes = []
    for image in line:
        if isinstance(image, Image.Image):
            sizes.append(image.size)
            continue
        try:
            sizes.append(size(image))
        except (OSError, PictureError) as error:
            raise DataError(f"The picture {image} cannot be read ({error}). Draw it again.") from error
    return sizes
