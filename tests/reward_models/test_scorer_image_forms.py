import io

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.base import ScorerError
from reward_models.preprocess import to_rgb
from tests.reward_models.toy import noise_image

PICTURE = noise_image(3, 40, 24)
ARRAY = np.asarray(PICTURE)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_same(image, expected=PICTURE):
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    "form",
    [
        lambda: PICTURE,
        lambda: encoded(PICTURE),
        lambda: bytearray(encoded(PICTURE)),
        lambda: ARRAY,
        lambda: ARRAY.astype(np.float32) / 255,
        lambda: torch.from_numpy(ARRAY.copy()).permute(2, 0, 1),
        lambda: torch.from_numpy(ARRAY.copy()).permute(2, 0, 1).double() / 255,
        lambda: PICTURE.convert("RGBA"),
        lambda: np.dstack([ARRAY, np.full(ARRAY.shape[:2], 255, np.uint8)]),
    ],
    ids=["pil", "bytes", "bytearray", "uint8", "float", "tensor uint8", "tensor double", "RGBA", "array RGBA"],
)
def test_lossless_forms_give_the_same_picture(form):
    assert_same(to_rgb(form()))


def test_paths_are_opened(tmp_path):
    PICTURE.save(tmp_path / "picture.webp", lossless=True)
    assert_same(to_rgb(tmp_path / "picture.webp"))
    assert_same(to_rgb(str(tmp_path / "picture.webp")))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pil_does(mode):
    image = PICTURE.convert(mode)
    assert_same(to_rgb(image), image.convert("RGB"))


def test_transparency_is_laid_on_white():
    transparent = PICTURE.convert("RGBA")
    transparent.putalpha(0)
    white = Image.new("RGB", PICTURE.size, "white")
    assert_same(to_rgb(encoded(transparent)), white)
    assert_same(to_rgb(np.asarray(transparent)), white)
    palette = PICTURE.quantize(16)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 0] = 255
    assert_same(to_rgb(encoded(palette, transparency=0)), expected)


def test_cmyk_jpeg_keeps_its_colours():
    picture = to_rgb(encoded(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.asarray(picture).astype(int) - (200, 40, 40)).max() < 12


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    picture = np.asarray(to_rgb(encoded(Image.fromarray(grey))))
    assert picture.min() == 0
    assert picture.max() == 255
    assert 120 < picture.mean() < 135


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    assert_same(to_rgb(encoded(PICTURE, exif=exif)), PICTURE.transpose(Image.Transpose.ROTATE_270))


def test_one_channel_arrays_become_grey():
    grey = np.asarray(PICTURE.convert("L"))
    expected = PICTURE.convert("L").convert("RGB")
    for form in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert_same(to_rgb(form), expected)


def test_the_given_image_is_left_alone():
    image = PICTURE.convert("RGBA")
    to_rgb(image).putpixel((0, 0), (1, 2, 3))
    assert_same(image.convert("RGB"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.png", "no image file no/such/file.png"),
        (encoded(noise_image(0, 200, 200), "JPEG")[:2000], "2000 encoded bytes.*truncated"),
        (encoded(noise_image(0, 200, 200))[:2000], "2000 encoded bytes.*truncated"),
        (b"not an image", "12 encoded bytes"),
        (7, "cannot be a int"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\]"),
        (torch.zeros(4, 4, 3), r"\[3, H, W\].*shape \[4, 4, 3\]"),
        (np.full((4, 4, 3), np.nan), "values in .0, 1. only"),
        (torch.full((3, 4, 4), 1.5), "values in .0, 1. only"),
        (np.zeros((4, 4, 3), np.int64), "uint8 or floating point"),
        (Image.new("F", (4, 4), 7.0), "mode F.*range is unknown"),
        (Image.new("I", (4, 4), -1), "mode I.*range is unknown"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(ScorerError, match=message):
        to_rgb(image)
