"""How a grid is laid out and painted: measures, colours, type, rounded corners."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFont

from diffalign.errors import UserError
from diffalign.evaluation.fonts import DEFAULT, DEFAULT_BOLD
from diffalign.evaluation.scoring import format_score

_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_OVERSAMPLING = 4  # masks are drawn this much larger and shrunk, which smooths their edges


@dataclass(frozen=True)
class Theme:
    """Name the colours of a grid."""

    background: str
    ink: str
    muted: str
    line: str
    win: str


THEMES = {
    "light": Theme(background="#ffffff", ink="#16181d", muted="#6a707c", line="#e4e6ea", win="#0b7a5b"),
    "dark": Theme(background="#101216", ink="#e9ebef", muted="#989fac", line="#2a2e36", win="#45c79c"),
}


class Layout:
    """Measure everything in units of a 256-pixel cell, so that grids of any cell size look alike."""

    def __init__(
        self, cell: int, columns: int, scores: int, title: str, subtitle: str, theme: Theme, font: str | None
    ) -> None:
        """Take the side of a picture in pixels, the numbers of columns and scorers, and what is set above them."""
        self.cell, self.unit, self.theme, self.font_file = cell, cell / 256, theme, font
        self.title, self.subtitle = title, subtitle
        self.margin, self.gap, self.row_gap = self.px(28), self.px(18), self.px(24)
        self.caption_width, self.line_height, self.score_height = self.px(190), self.px(20), self.px(19)
        self.title_height = (self.px(32) if title else 0) + (self.px(22) if subtitle else 0)
        self.title_height += self.px(14) if self.title_height else 0
        self.first_row = self.margin + self.title_height + self.px(30)
        self.below_picture = self.px(9) + scores * self.score_height if scores else 0
        self.width = self.column_left(columns) - self.gap + self.margin

    def px(self, units: float) -> int:
        """Return a length in pixels, at least 1."""
        return max(1, round(units * self.unit))

    def column_left(self, column: int) -> int:
        """Return where the pictures of a column begin."""
        return self.margin + self.caption_width + self.px(22) + column * (self.cell + self.gap)

    def score_top(self, number: int) -> int:
        """Return how far below its picture a line of scores begins."""
        return self.px(9) + number * self.score_height

    def font(self, units: float, bold: bool = False) -> ImageFont.FreeTypeFont:
        """Return the grid's font at a size in units."""
        return load_font(self.font_file, bold, self.px(units))


class Painter:
    """Paint the parts of a grid where a layout puts them."""

    def __init__(self, canvas: Image.Image, layout: Layout) -> None:
        """Paint on `canvas`."""
        self.canvas, self.layout, self.theme = canvas, layout, layout.theme
        self.draw = ImageDraw.Draw(canvas)

    def heading(self, columns: Sequence[str]) -> None:
        """Paint title, subtitle and the names of the columns."""
        layout, top = self.layout, self.layout.margin
        room = layout.width - 2 * layout.margin
        if layout.title:
            self._line(layout.margin, top, layout.title, layout.font(21, bold=True), self.theme.ink, room)
            top += layout.px(32)
        if layout.subtitle:
            self._line(layout.margin, top, layout.subtitle, layout.font(13), self.theme.muted, room)
        top = layout.margin + layout.title_height
        for column, name in enumerate(columns):
            self._line(layout.column_left(column), top, name, layout.font(15, bold=True), self.theme.ink, layout.cell)

    def caption(self, text: str, label: str, top: int, height: int) -> None:
        """Paint a row's rule, its prompt in at most `height` pixels, and its label."""
        layout = self.layout
        self.draw.rectangle(
            (layout.margin, top, layout.margin + layout.caption_width, top + layout.px(1) - 1), fill=self.theme.line
        )
        font, small = layout.font(14.5), layout.font(12)
        room = height - layout.px(10) - (layout.px(24) if label else 0)
        lines = wrap_text(text, font, layout.caption_width, max(1, room // layout.line_height))
        top += layout.px(10)
        for line in lines:
            self.draw.text((layout.margin, top), line, font=font, fill=self.theme.ink)
            top += layout.line_height
        if label:
            self._line(layout.margin, top + layout.px(6), label, small, self.theme.muted, layout.caption_width)

    def picture(self, picture: Image.Image, left: int, top: int, framed: bool) -> None:
        """Paint a picture with rounded corners, in a frame if it won."""
        layout = self.layout
        picture = fit_width(picture, layout.cell)
        radius = layout.px(7)
        if framed:
            # The frame stands off the picture, so that none of its pixels are covered.
            space, stroke = layout.px(5), layout.px(2.5)
            box = (left - space, top - space, left + picture.width + space, top + picture.height + space)
            self._rounded_frame(box, radius + space, stroke)
        self.canvas.paste(picture, (left, top), rounded_mask(picture.size, radius))

    def score(self, name: str, value: float, left: int, top: int, won: bool) -> None:
        """Paint a line of scorer and score, marked if it is the best of its row."""
        layout = self.layout
        font = layout.font(13, bold=won)
        text = format_score(value)
        width = font.getlength(text)
        right = left + layout.cell
        self.draw.text((right - width, top), text, font=font, fill=self.theme.win if won else self.theme.ink)
        if won:
            mark = triangle_mask(layout.px(8))
            corner = (round(right - width) - layout.px(5) - mark.width, top + layout.px(4))
            self.canvas.paste(Image.new("RGB", mark.size, self.theme.win), corner, mark)
        room = int(layout.cell - width - layout.px(24))
        self._line(left, top, name, layout.font(13), self.theme.muted, room)

    def _line(self, left: int, top: int, text: str, font: ImageFont.FreeTypeFont, fill: str, room: int) -> None:
        self.draw.text((left, top), shorten(text, font, room), font=font, fill=fill)

    def _rounded_frame(self, box: tuple[int, int, int, int], radius: int, stroke: int) -> None:
        size = (box[2] - box[0], box[3] - box[1])
        inner = rounded_mask((size[0] - 2 * stroke, size[1] - 2 * stroke), max(1, radius - stroke))
        hole = Image.new("L", size, 0)
        hole.paste(inner, (stroke, stroke))
        ring = ImageChops.subtract(rounded_mask(size, radius), hole)
        self.canvas.paste(Image.new("RGB", size, self.theme.win), box[:2], ring)


@lru_cache(maxsize=64)
def load_font(file: str | None, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """Return a TrueType font of `size` pixels: `file`, or the DejaVu Sans that matplotlib ships."""
    path = file or (DEFAULT_BOLD if bold else DEFAULT)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise UserError(f"The font {path} cannot be read ({error}). Expected a TrueType or OpenType file.") from error


@lru_cache(maxsize=64)
def rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """Return a mask of `size` that is opaque but for its rounded corners."""
    large = Image.new("L", (size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING), 0)
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * _OVERSAMPLING, fill=255)
    return large.resize(size, Image.Resampling.BOX)


@lru_cache(maxsize=64)
def triangle_mask(size: int) -> Image.Image:
    """Return the mask of a triangle that points up, `size` pixels wide and high."""
    side = size * _OVERSAMPLING
    large = Image.new("L", (side, side), 0)
    ImageDraw.Draw(large).polygon([(0, side), (side, side), (side / 2, side * 0.1)], fill=255)
    return large.resize((size, size), Image.Resampling.BOX)


def fit_width(picture: Image.Image, width: int) -> Image.Image:
    """Return the picture at another width: whole factors repeat pixels, all else is Lanczos."""
    if picture.width == width:
        return picture
    height = max(1, picture.height * width // picture.width)
    whole = width % picture.width == 0
    return picture.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return one line no wider than `width` pixels, ending in an ellipsis where it was cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + _ELLIPSIS) > width:
        text = text[:-1]
    return text.rstrip(" ,.;:") + _ELLIPSIS


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Return at most `lines` lines no wider than `width` pixels; a word wider than a line is broken."""
    wrapped, current = [], ""
    for word in text.split():
        candidate = f"{current} {word}".strip()
        if font.getlength(candidate) <= width:
            current = candidate
            continue
        if current:
            wrapped.append(current)
        while font.getlength(word) > width:
            cut = next((end for end in range(len(word) - 1, 1, -1) if font.getlength(word[:end]) <= width), 1)
            wrapped.append(word[:cut])
            word = word[cut:]
        current = word
    wrapped.append(current)
    if len(wrapped) <= lines:
        return wrapped
    return [*wrapped[: lines - 1], shorten(" ".join(wrapped[lines - 1 :]), font, width)]
