"""The one opener of pictures: what training, scoring, evaluation and the label server see of a file is the same RGB.

Only formats that Pillow decodes itself are opened (PostScript would start a program), and nothing is decoded before
its size is known. How a picture becomes 8-bit RGB is said in docs/data-formats.md. Used by `diffalign` as well.
"""

import io
import logging
import mmap
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from reward_models.errors import ScorerError
from reward_models.pixels_only import bare

_log = logging.getLogger("reward_models")
T = TypeVar("T")

# Format: the module of Pillow (or a plug-in) that reads it, and the part of Pillow it needs.
_READERS = {
    "PNG": ("PIL.PngImagePlugin", None),
    "JPEG": ("PIL.JpegImagePlugin", "jpg"),
    "MPO": ("PIL.MpoImagePlugin", "jpg"),  # a JPEG with a second picture behind it, as phones write them
    "WEBP": ("PIL.WebPImagePlugin", "webp"),
    "GIF": ("PIL.GifImagePlugin", None),
    "BMP": ("PIL.BmpImagePlugin", None),
    "TIFF": ("PIL.TiffImagePlugin", None),
    "PPM": ("PIL.PpmImagePlugin", None),
    "JPEG2000": ("PIL.Jpeg2KImagePlugin", "jpg_2000"),
    "AVIF": ("PIL.AvifImagePlugin", "avif"),
    "HEIF": ("pillow_heif", None),
    "JXL": ("pillow_jxl", None),
}
PIXELS, BYTES = "DIFFALIGN_MAX_PIXELS", "DIFFALIGN_MAX_PICTURE_BYTES"
# Pillow's own warning threshold, and what such a picture takes as RGB without compression.
LIMITS = {PIXELS: 89_478_485, BYTES: 268_435_456}
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = [_TURNS[value] for value in (5, 6, 7, 8)]
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_told = mmap.mmap(-1, 1)  # worker processes that were forked share it: one of them tells


class PictureError(ScorerError):
    """Report what is wrong with one picture, in words that follow its name: "it is empty"."""


def _available() -> frozenset[str]:
    """Import the readers there are and return their formats."""
    found = set()
    for name, (module, feature) in _READERS.items():
        with suppress(ImportError):
            reader = import_module(module)
            if hasattr(reader, "register_heif_opener"):
                reader.register_heif_opener()
            if feature is None or features.check(feature):
                found.add(name)
    return frozenset(found)


FORMATS = _available()
SUFFIXES = tuple(sorted(suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS))
# It would be printed before the error that `_seen` raises.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def limit(name: str) -> int:
    """Return PIXELS or BYTES: what a picture may have at most; the environment variable of that name changes it."""
    text = os.environ.get(name)
    if text is None:
        return LIMITS[name]
    if not re.fullmatch(r"[1-9][0-9_]{0,18}", text.strip()):
        raise ScorerError(f'{name} must be a whole number above 0, got "{text[:80]}".')
    return int(text)


def read(file: str | os.PathLike, offset: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a picture file, or `size` of them from `offset` on.

    Raises:
        OSError: it is missing or cannot be read.
        PictureError: it is no regular file (a FIFO would hang, a device never ends), too large, or ends before.
    """
    with open_regular(file) as opened:
        wanted = os.fstat(opened.fileno()).st_size - offset if size is None else size
        _check_bytes(wanted)
        opened.seek(offset)
        content = opened.read(max(wanted, 0))
    if size is not None and len(content) < size:
        raise PictureError(f"{file} ends in the middle of it")
    return content


def whole(file: str | os.PathLike) -> bytes:
    """Return the bytes of a file that is a picture, to be copied or sent; raise OSError or PictureError."""
    content = read(file)
    decode(content)
    return content


def open_regular(file: str | os.PathLike) -> BinaryIO:
    """Open a file for reading; raise OSError, or PictureError where it is a folder, a FIFO or a device."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise PictureError("it is no regular file (a folder, a pipe or a device)")
    return open(file, "rb")


def size(picture: bytes | str | os.PathLike) -> tuple[int, int]:
    """Return the upright width and height of encoded bytes or of a file, reading no pixels; raise OSError too."""
    if isinstance(picture, bytes):
        return _with_bare_copy(picture, _upright_size)
    try:
        with open_regular(picture) as opened:
            return _seen(opened, _upright_size)
    except ScorerError:
        raise
    except Exception:  # the file is gone, which reading it tells, or its metadata stand in the way
        return size(read(picture))


def format_of(content: bytes) -> str:
    """Return what Pillow calls the format of an encoded picture, "PNG"; raise PictureError."""
    return _with_bare_copy(content, lambda image: image.format or "")


def decode(content: bytes) -> Image.Image:
    """Return an encoded picture as 8-bit RGB, upright, with nothing but pixels; raise PictureError.

    Of an animation it is the first frame. Metadata that cannot be read does not matter.
    """
    return _with_bare_copy(content, _first_frame)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image as 8-bit RGB, upright, transparency laid on white; one that is so already is itself.

    16 bits lose their lower 8; 32-bit whole numbers and floats are scaled as `_scaled` says. Raises PictureError.
    """
    image.load()
    turn = _turn(image)
    image = _eight_bit(image)
    image = image if turn is None else image.transpose(turn)
    if image.mode == "LAB":
        raise PictureError("its colours are of the mode LAB, which has no RGB here; write it as RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    # convert("RGB") alone would show the arbitrary colours that hide under transparent pixels.
    image = image.convert("LA") if image.mode == "La" else image
    image = _rgba(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes a picture upright; None where it is, or where its metadata are beyond reading."""
    with suppress(Exception):
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow turns TIFFs itself.
    return image.size[::-1] if image.format != "TIFF" and _turn(image) in _ON_ITS_SIDE else image.size


def _first_frame(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a broken second frame is nobody's
        if image.format in _ANIMATED and image.is_animated and not _told[0]:
            _told[0] = 1
            _log.warning("Some pictures are animations (%s): of each, the first frame is used.", image.format)
    rgb = to_rgb(image)
    rgb.info = {}
    return rgb


def _with_bare_copy(content: bytes, see: Callable[[Image.Image], T]) -> T:
    """Return what `see` makes of an opened picture; where its metadata stand in the way, of a copy without."""
    if not content:
        raise PictureError("it is empty")
    _check_bytes(len(content))
    is_tiff = content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    try:
        # Pillow reads every tag of a TIFF, however odd, before it turns the picture.
        return _seen(io.BytesIO((is_tiff and bare(content)) or content), see)
    except ScorerError:
        raise
    except Exception as error:  # decoders raise anything on damaged or hostile bytes
        with suppress(Exception):
            if not is_tiff and (copy := bare(content)) is not None:
                return _seen(io.BytesIO(copy), see)
        raise PictureError(_why(error, content)) from error


def _seen(encoded: BinaryIO, see: Callable[[Image.Image], T]) -> T:
    most = limit(PIXELS)
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most  # asked for by the environment; Pillow refuses more than twice its own
    try:
        opened = Image.open(encoded, formats=sorted(FORMATS & Image.OPEN.keys()))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(_too_large(" ".join(re.findall(r"\d+ pixels", str(error))[:1]))) from error
    with opened as image:
        if image.width * image.height > most:
            raise PictureError(_too_large(f"{image.width}x{image.height} pixels"))
        return see(image)


def _check_bytes(count: int) -> None:
    if count > limit(BYTES):
        raise PictureError(f"it has {count} bytes, more than {limit(BYTES)}; set {BYTES} where that is meant")


def _too_large(found: str) -> str:
    return f"it has {found}, more than {limit(PIXELS)}; it was not decoded. Set {PIXELS} where that is meant"


def _why(error: Exception, content: bytes) -> str:
    """Return Pillow's reason; its words for an unknown file hold a memory address, which no two runs share."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())[:200] or type(error).__name__
    if content[:4] in (b"II*\0", b"MM\0*"):
        return "it is a TIFF of a kind that is not read: 8 or 16 bits a colour, or grey of any depth, are"
    return "it is not a picture"


def _rgba(image: Image.Image) -> Image.Image:
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
        image = image.copy()  # a PNG of 16 bits, whose pixels have lost the lower 8 by now
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image.convert("RGBA")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return a picture of one deep channel (I;16, I, F) with 8 bits; others as they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    grey = _scaled(values, image.mode, image.format, tags)
    grey = Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _scaled(values: np.ndarray, mode: str, kind: str | None, tags: Mapping[int, Any]) -> np.ndarray:
    """Return grey [H,W] uint8 of deep values.

    Whole numbers lose their lower bits: 8 of 16; 24 (unsigned) or 23 (signed) of 32. Files of 32 bits often hold 8 or
    16: what the largest value fits in counts. Floats are taken to lie in [0, 1]; or, where the largest is above 16, in
    [0, 255], above 255 in [0, 65535]. Raises PictureError for negative and other values, whose range is not known.
    """
    bits, signed = (tags.get(_BITS) or (0,))[0], (tags.get(_SAMPLE_FORMAT) or (2,))[0] == 2
    if mode == "F":
        return _scaled_floats(values)
    if mode != "I" or kind in ("PPM", "PNG"):
        return (values.astype(np.int64) >> (4 if bits == 12 else 8)).clip(0, 255).astype(np.uint8)
    values = values if signed else values.view(np.uint32)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0:
        raise PictureError(f"it holds numbers from {low} to {high} (mode I), whose range is unknown; write it as 8-bit")
    lost = 7 if bits == 16 else 0 if high < 2**8 else 8 if high < 2**16 else 23 if signed else 24
    return (values >> lost).astype(np.uint8)


def _scaled_floats(values: np.ndarray) -> np.ndarray:
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    scale = 255.0 if high <= 1.001 else 1.0 if 16 < high <= 255 else 1 / 257 if 255 < high <= 65535 else None
    if scale is None or not low >= -0.001:  # NaN fails both as well
        raise PictureError(
            f"it holds floats from {low:.4g} to {high:.4g} (mode F), whose range is unknown; write them in [0, 1]"
        )
    return np.round(values * scale).clip(0, 255).astype(np.uint8)
