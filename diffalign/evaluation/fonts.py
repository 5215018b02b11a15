"""Which font can set a text: the grid's own, one that is installed, or none; then what is missing is told."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font

DEFAULT, DEFAULT_BOLD = (
    str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")
)
_SHOWN = 8  # characters in a message
_READ_ERRORS = (OSError, RuntimeError, ValueError)  # what FreeType's wrapper is known to raise


def fitting_font(font: str | None, texts: Iterable[str]) -> str | None:
    """Return the font that was asked for; if none was, an installed one where DejaVu Sans lacks characters of texts.

    None stands for DejaVu Sans: because it has all of them, or because no installed font has.
    """
    wanted = _characters(texts)
    if font is not None or wanted <= _known(DEFAULT):
        return font
    return _installed(wanted)


def missing_glyphs(font: str | None, texts: Iterable[str]) -> str:
    """Return what a font shows as boxes and how to mend it, in one sentence; "" if it has all characters of texts."""
    file = fitting_font(font, texts)
    missing = sorted(_characters(texts) - _known(file or DEFAULT))
    if not missing:
        return ""
    name = Path(file).name if file else "DejaVu Sans"
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"The font {name} lacks {len(missing)} characters of the prompts ({''.join(missing[:_SHOWN])}{more}): they are "
        "drawn as boxes. Install a font that has them, e.g. Noto Sans CJK for Chinese."
    )


def _characters(texts: Iterable[str]) -> frozenset[str]:
    """Return the characters that need a glyph."""
    found = frozenset(character for text in texts for character in text)
    return frozenset(c for c in found if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Mn"))


@lru_cache(maxsize=8)
def _known(file: str) -> frozenset[str]:
    """Return the characters that a font has glyphs for; none if it cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except _READ_ERRORS:
        return frozenset()


@lru_cache(maxsize=8)
def _installed(wanted: frozenset[str]) -> str | None:
    """Return an installed font, upright and regular if there is one, that has all of some characters."""
    from matplotlib import font_manager  # it looks through the machine's fonts: only where that is needed

    def plainness(entry: font_manager.FontEntry) -> tuple[bool, bool, str]:
        return entry.style != "normal", entry.weight not in ("normal", "regular", 400), entry.fname

    # Last Resort, which matplotlib ships, has a box for every character.
    fonts = [entry for entry in font_manager.fontManager.ttflist if "last resort" not in entry.name.lower()]
    fonts = sorted(fonts, key=plainness)
    return next((entry.fname for entry in fonts if wanted <= _known(entry.fname) and _sets(entry.fname)), None)


def _sets(file: str) -> bool:
    """Tell whether Pillow can set a font at any size; fonts of bitmaps have one."""
    from PIL import ImageFont

    try:
        return bool(ImageFont.truetype(file, 17).getlength("a"))
    except _READ_ERRORS:
        return False
