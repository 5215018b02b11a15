"""The one opener: every kind of picture becomes the same 8-bit RGB, and no file can do harm."""

import io
import logging
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from reward_models import pictures
from reward_models.errors import ScorerError
from reward_models.pictures import PictureError, decode, format_of, read, size, to_rgb
from tests.reward_models.toy import noise_image

COLOUR = noise_image(5, 40, 24)
GREY = np.asarray(COLOUR.convert("L"))
TURNED = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)  # shown after a quarter turn clockwise


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(picture):
    return np.asarray(picture).astype(int)


def grey_tiff(values, compression="raw"):
    """Return a TIFF of one channel."""
    return encoded(Image.fromarray(values), "TIFF", compression=compression)


def raw_tiff(values, *entries):
    """Return an uncompressed little-endian TIFF [H,W] with further entries (tag, type, value); values say the depth."""
    formats = {"u": 1, "i": 2, "f": 3}
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 4, height), (279, 4, values.nbytes), (339, 3, formats[values.dtype.kind])]  # fmt: skip
    tags = sorted({tag: (tag, kind, value) for tag, kind, value in [*tags, *entries]}.values())
    words = {3: "<HH", 4: "<I"}
    body = [
        struct.pack("<HHI", tag, kind, 1) + struct.pack(words.get(kind, "<I"), *((value, 0) if kind == 3 else (value,)))
        for tag, kind, value in tags
    ]
    data = values.tobytes()
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + b"".join(body) + bytes(4)


def exif(*entries):
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def chunked(*chunks):
    """Return a PNG of chunks (kind, data)."""
    made = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"".join([b"\x89PNG\r\n\x1a\n", *made])


def with_chunks(png, *chunks):
    """Return a PNG with chunks (kind, data) behind its header."""
    return png[:33] + chunked(*chunks)[8:] + png[33:]


def black_png(width, height):
    """Return a PNG of one bit a pixel: tens of kilobytes, whatever its size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 1)
    return chunked((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))


DEEP = {
    "png 16": lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257)),
    "tiff 16": lambda: grey_tiff(GREY.astype(np.uint16) * 257),
    "tiff 16 lzw": lambda: grey_tiff(GREY.astype(np.uint16) * 257, "tiff_lzw"),
    "tiff 16 big-endian": lambda: encoded(
        Image.frombytes("I;16B", COLOUR.size, (GREY.astype(">u2") * 257).tobytes()), "TIFF"
    ),
    "tiff 16 signed": lambda: raw_tiff(GREY.astype(np.int16) << 7),
    "tiff 16 white is zero": lambda: raw_tiff(65535 - GREY.astype(np.uint16) * 257, (262, 3, 0)),
    "tiff 32 holding 8": lambda: grey_tiff(GREY.astype(np.int32)),
    "tiff 32 holding 16": lambda: grey_tiff(GREY.astype(np.int32) * 257, "tiff_adobe_deflate"),
    "tiff 32 signed": lambda: grey_tiff(GREY.astype(np.int32) << 23),
    "tiff 32 unsigned": lambda: raw_tiff(GREY.astype(np.uint32) * 0x01010101),
    "tiff float": lambda: grey_tiff((GREY / 255).astype(np.float32)),
    "tiff float to 255": lambda: grey_tiff(GREY.astype(np.float32), "tiff_lzw"),
    "tiff float to 65535": lambda: grey_tiff(GREY.astype(np.float32) * 257),
    "pgm 16": lambda: b"P5 40 24 65535\n" + (GREY.astype(">u2") * 257).tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_any_depth_is_the_same_picture(kind):
    assert np.array_equal(pixels(decode(DEEP[kind]())), np.stack([GREY] * 3, -1))


def test_colours_of_16_bits_are_the_same_picture():
    deep = np.asarray(COLOUR).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)
    png = chunked((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    assert np.array_equal(pixels(decode(png)), pixels(COLOUR))


def test_modes_in_memory_follow_the_same_rules():
    big = Image.frombytes("I;16B", COLOUR.size, (GREY.astype(">u2") * 257).tobytes())
    for image in (big, Image.fromarray(GREY.astype(np.int32) * 257), Image.fromarray((GREY / 255).astype(np.float32))):
        assert np.array_equal(pixels(to_rgb(image)), np.stack([GREY] * 3, -1))


def test_ordinary_pictures_are_bit_for_bit_what_pillow_decodes():
    for content in (
        encoded(COLOUR),
        encoded(COLOUR, "JPEG", quality=85),
        encoded(COLOUR, "BMP"),
        encoded(COLOUR, "TIFF"),
    ):
        with Image.open(io.BytesIO(content)) as opened:
            assert decode(content).tobytes() == opened.convert("RGB").tobytes()


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_transparency_of_any_kind_is_laid_on_white(alpha):
    opaque = COLOUR.convert("RGBA")
    opaque.putalpha(alpha)
    expected = pixels(Image.alpha_composite(Image.new("RGBA", COLOUR.size, "white"), opaque).convert("RGB"))
    for content in (encoded(opaque), encoded(opaque, "TIFF"), encoded(opaque, "WEBP", lossless=True, exact=True)):
        assert np.array_equal(pixels(decode(content)), expected)
    grey = Image.fromarray(GREY).convert("LA")
    grey.putalpha(alpha)
    assert np.abs(pixels(decode(encoded(grey)))[..., 0] - (GREY.astype(float) * alpha / 255 + 255 - alpha)).max() <= 1


def test_one_transparent_colour_is_white():
    palette = COLOUR.quantize(16)
    seen = pixels(palette.convert("RGB"))
    seen[np.asarray(palette) == 3] = 255
    for kind in ("PNG", "GIF"):
        assert np.array_equal(pixels(decode(encoded(palette, kind, transparency=3))), seen)
    deep = GREY.astype(np.uint16) * 257
    found = pixels(decode(encoded(Image.fromarray(deep), transparency=int(deep[0, 0]))))
    assert (found[deep == deep[0, 0]] == 255).all()
    assert np.array_equal(found[deep != deep[0, 0]][:, 0], GREY[deep != deep[0, 0]])


def test_cmyk_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK")
    for content in (
        encoded(red, "JPEG", quality=100),
        encoded(red, "TIFF"),
        encoded(red, "TIFF", compression="tiff_lzw"),
    ):
        assert np.abs(pixels(decode(content)) - (200, 40, 40)).max() < 12


ODD_TAGS = {
    "a resolution in words": struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0"),
    "a resolution beyond the end": struct.pack("<HHII", 0x11A, 5, 1, 0xFFFFFF00),
    "a maker's note of four gigabytes": struct.pack("<HHII", 0x927C, 7, 0xFFFFFFFF, 8),
    "a directory that is itself": struct.pack("<HHII", 0x8769, 4, 1, 8),
    "an unknown type": struct.pack("<HHII", 0x131, 99, 1, 0),
}


@pytest.mark.parametrize("entry", ODD_TAGS.values(), ids=list(ODD_TAGS))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_whatever_else_the_metadata_say(entry, kind):
    content = encoded(COLOUR, kind, exif=exif(TURNED, entry) if kind != "PNG" else exif(TURNED, entry)[6:])
    plain = decode(encoded(COLOUR, kind))
    assert decode(content).tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert size(content) == decode(content).size == (24, 40)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(value):
    content = encoded(COLOUR, exif=exif(struct.pack("<HHIHH", 0x112, 3, 1, value, 0))[6:])
    assert decode(content).tobytes() == COLOUR.tobytes()


def test_a_tiff_is_turned_once_and_odd_tags_do_not_matter():
    plain = raw_tiff(GREY.astype(np.uint16) * 257)
    content = raw_tiff(
        GREY.astype(np.uint16) * 257, (274, 3, 6), (296, 3, 3), (282, 2, 0x61), (283, 2, 0x61), (700, 9, 1)
    )
    assert decode(content).tobytes() == decode(plain).transpose(Image.Transpose.ROTATE_270).tobytes()
    assert size(content) == (24, 40)


def test_metadata_of_any_size_do_not_matter():
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat " * 600_000, zip=True)
    profile = zlib.compress(random.Random(0).randbytes(3 << 20))
    many = [(b"tEXt", b"k\0" + bytes(1 << 20))] * 66
    cases = (
        encoded(COLOUR, pnginfo=text),
        with_chunks(encoded(COLOUR), (b"iCCP", b"icc\0\0" + profile)),
        with_chunks(encoded(COLOUR), *many),
        with_chunks(encoded(COLOUR), (b"iTXt", b"broken"), (b"pHYs", b"x"), (b"gAMA", b"")),
        encoded(COLOUR, icc_profile=bytes(2 << 20)),
    )
    for content in cases:
        assert decode(content).tobytes() == COLOUR.tobytes()
    assert decode(cases[0]).info == {}
    jpeg = encoded(COLOUR, "JPEG")
    assert decode(encoded(COLOUR, "JPEG", icc_profile=bytes(1 << 20))).tobytes() == decode(jpeg).tobytes()


def test_damage_beside_the_pixels_does_not_matter():
    png = with_chunks(encoded(COLOUR), (b"eXIf", exif(TURNED)[6:]), (b"tEXt", b"a\0b"))
    for place in (b"eXIf", b"tEXt"):
        broken = bytearray(png)
        broken[png.index(place) + 5] ^= 0xFF  # the checksum is wrong now
        assert decode(bytes(broken)).size in (COLOUR.size, COLOUR.size[::-1])


def test_animations_show_their_first_frame_and_are_told_once(caplog):
    pictures._told[0] = 0
    frames = [COLOUR, COLOUR.transpose(Image.Transpose.ROTATE_180)]
    with caplog.at_level(logging.WARNING):
        for kind, how in (("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})):
            content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
            assert np.abs(pixels(decode(content)) - pixels(COLOUR)).mean() < 16
            assert np.abs(pixels(decode(content)) - pixels(frames[1])).mean() > 32
    assert [record.message.split(":")[0] for record in caplog.records] == ["Some pictures are animations (PNG)"]


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "PCX", "SGI"])
def test_other_formats_are_not_opened(kind):
    with pytest.raises(PictureError, match="not a picture"):
        decode(encoded(COLOUR, kind))


def test_size_is_known_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", None)
    wide = black_png(13_000, 13_000)
    for see in (decode, size, format_of):
        with pytest.raises(PictureError, match=r"it has 13000x13000 pixels.*DIFFALIGN_MAX_PIXELS"):
            see(wide)
    with pytest.raises(PictureError, match=r"400000000 pixels.*DIFFALIGN_MAX_PIXELS"):
        decode(black_png(20_000, 20_000))


def test_the_limits_are_settings(monkeypatch):
    content = encoded(COLOUR)
    monkeypatch.setenv(pictures.PIXELS, "959")
    with pytest.raises(PictureError, match="40x24 pixels, more than 959"):
        decode(content)
    monkeypatch.setenv(pictures.PIXELS, "960")
    assert decode(content).size == (40, 24)
    monkeypatch.setenv(pictures.BYTES, "100")
    with pytest.raises(PictureError, match="bytes, more than 100; set DIFFALIGN_MAX_PICTURE_BYTES"):
        decode(content)
    monkeypatch.setenv(pictures.BYTES, "many")
    with pytest.raises(ScorerError, match='must be a whole number above 0, got "many"'):
        decode(content)


def test_only_regular_files_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        for reader in (read, size):
            with pytest.raises(PictureError, match="no regular file"):
                reader(file)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.png")
    sparse = tmp_path / "sparse.png"
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    with pytest.raises(PictureError, match=f"it has {1 << 40} bytes"):
        read(sparse)
    (tmp_path / "a.png").write_bytes(b"0123456789")
    assert read(tmp_path / "a.png", 2, 3) == b"234"
    with pytest.raises(PictureError, match="ends in the middle"):
        read(tmp_path / "a.png", 8, 3)
    with pytest.raises(PictureError, match="it is empty"):
        decode(b"")


def test_damaged_pictures_are_refused_and_never_raise_anything_else():
    draw = random.Random(0)
    seeds = [encoded(COLOUR, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "PPM", "JPEG2000")]
    seeds += [encoded(COLOUR.convert("P"), "GIF"), raw_tiff(GREY), encoded(COLOUR, "JPEG", exif=exif(TURNED))]
    outcomes = {"fine": 0, "refused": 0}
    for number in range(600):
        content = bytearray(seeds[number % len(seeds)])
        for _ in range(draw.choice([1, 3, 20])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        content = bytes(content[: draw.randrange(len(content))] if draw.random() < 0.2 else content)
        try:
            assert decode(content).mode == "RGB"
            outcomes["fine"] += 1
        except PictureError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_what_is_wrong_is_said():
    whole = encoded(noise_image(0, 200, 200), "JPEG")
    for content, reason in (
        (whole[:2000], "truncated|broken data"),
        (b"GIF89a", "not a picture"),
        (raw_tiff(GREY.astype(np.float64)), "a TIFF of a kind that is not read"),
        (grey_tiff(np.full((4, 4), 5.0, np.float32)), "floats from 5 to 5.*range is unknown"),
        (grey_tiff(np.full((4, 4), np.nan, np.float32)), "floats from nan to nan"),
        (encoded(Image.frombytes("LAB", (4, 4), bytes(48)), "TIFF"), "the mode LAB"),
        (grey_tiff(np.full((4, 4), -3, np.int32)), "numbers from -3 to -3"),
    ):
        with pytest.raises(PictureError, match=reason):
            decode(content)
