import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.data.pairs import Example, ImageRef, ListRow, PairRow, Place, RowError
from tests.data.world import picture


def encoded(image: Image.Image, format: str, **options) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return ImageRef(data=buffer.getvalue())


def test_bytes_and_file_of_the_same_content_have_one_identity(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    held, filed = ImageRef(data=picture(1)), ImageRef(path=tmp_path / "a.png")
    assert held.identity == filed.identity
    assert held.load().tobytes() == filed.load().tobytes()
    assert ImageRef(data=picture(2)).identity != held.identity


def test_example_id_depends_on_prompt_and_ordered_images_only():
    a, b = ImageRef(data=picture(1)), ImageRef(data=picture(2))
    row = PairRow(0, "cat", a, b)
    assert 0 <= row.example_id < 2**63
    assert PairRow(7, "cat", a, b, preference=0.9, extra={"x": 1}).example_id == row.example_id
    others = {
        PairRow(0, "dog", a, b).example_id,
        PairRow(0, "cat", b, a).example_id,
        PairRow(0, "cat", a, a).example_id,
    }
    assert len(others) == 3
    assert row.example_id not in others


def test_example_id_is_pinned():
    # Cached ids and recorded noise depend on it: a change invalidates every run that is to be resumed.
    assert PairRow(0, "cat", ImageRef(data=b"w"), ImageRef(data=b"l")).example_id == PINNED


def test_a_second_caption_enters_the_id_only_where_it_differs():
    a, b = ImageRef(data=b"w"), ImageRef(data=b"l")
    assert PairRow(0, "cat", a, b, rejected_prompt="cat").example_id == PINNED
    ids = {PairRow(0, "cat", a, b, rejected_prompt=prompt).example_id for prompt in (None, "dog", "a cat")}
    ids |= {PairRow(0, "dog", a, b, rejected_prompt="cat").example_id}
    assert len(ids) == 4


def test_a_pair_and_a_list_are_examples():
    a, b, c = (ImageRef(data=bytes([i])) for i in range(3))
    pair = PairRow(3, "cat", a, b, rejected_prompt="dog", preference=0.7)
    ranked = ListRow.ranked(4, "cat", [a, b, c], [0.5, 1.0, 0.5], {"x": 1})
    assert (pair.prompts, pair.images, pair.scores) == (("cat", "dog"), (a, b), (None, None))
    assert (ranked.prompts, ranked.images, ranked.scores) == (("cat",) * 3, (b, a, c), (1.0, 0.5, 0.5))
    assert isinstance(pair, Example)
    assert isinstance(ranked, Example)
    assert (pair.preference, ranked.preference, ranked.extra) == (0.7, None, {"x": 1})
    assert PairRow(3, "cat", a, b).prompts == ("cat", "cat")
    ids = {ListRow(0, "cat", images, (1.0,) * len(images)).example_id for images in ((a,), (b,), (a, b, c), (b, a, c))}
    assert len(ids) == 4


PINNED = 2117857287808422706  # recorded from this implementation


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new("I;16", (8, 8), 9000) if mode == "I;16" else Image.new("RGB", (8, 8), "red").convert(mode)
    assert encoded(image, "TIFF").load().mode == "RGB"


def test_transparency_shows_white_not_hidden_colour():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    assert list(encoded(image, "PNG").load().get_flattened_data()) == [(255, 255, 255), (0, 0, 255)]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif).load().size == (10, 20)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_image_names_its_row(format):
    data = picture(3, (64, 64), format)
    with pytest.raises(RowError, match=r"a\.parquet, row 12: cannot decode the image") as caught:
        ImageRef(data=data[: len(data) // 2], place=Place("a.parquet", 12)).load()
    assert caught.value.reason == "broken image"


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(RowError, match="cannot decode the image") as caught:
        ImageRef(data=data).load()
    assert "0x" not in str(caught.value)


def test_missing_and_null_images_are_refused():
    with pytest.raises(RowError, match=r"cannot read /nowhere/a\.png"):
        ImageRef(path=Path("/nowhere/a.png")).load()
    with pytest.raises(RowError, match="null"):
        ImageRef().load()


def test_a_strip_is_refused_before_it_is_enlarged():
    with pytest.raises(RowError, match="3000x2"):
        ImageRef(data=picture(0, (3000, 2))).load()


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(RowError(Place("f", 3), "label", "bad")))
    assert (error.place.row, error.reason, str(error)[:9]) == (3, "label", "f, row 3:")


def test_decoding_keeps_pixels():
    wanted = np.random.default_rng(5).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert (np.asarray(ImageRef(data=picture(5)).load()) == wanted).all()
