"""The grid shows every picture unharmed, marks winners and fits its text."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from diffalign.errors import DataError, UserError
from diffalign.evaluation import comparison_grid, grid_of, save_grid
from diffalign.evaluation.typesetting import THEMES, fit_width, load_font, shorten, wrap_text

RED, BLUE = Image.new("RGB", (16, 16), (200, 30, 30)), Image.new("RGB", (16, 16), (30, 30, 200))
ROW = {"rows": ["seed 1"], "columns": ["base", "dpo"], "images": [[RED, BLUE]], "captions": ["a red square"]}


def count(grid, colour):
    return int((np.asarray(grid) == np.array(colour)).all(axis=-1).sum())


def test_every_picture_is_there_at_full_size():
    grid = comparison_grid(**ROW, cell=128)
    corners = 128 * 128 - count(grid, (200, 30, 30))
    assert 0 <= corners < 60
    assert count(grid, (30, 30, 200)) == count(grid, (200, 30, 30))


@pytest.mark.parametrize("theme", THEMES)
def test_the_frame_goes_to_the_winner_of_the_first_scorer(theme):
    scores = [[{"oracle": 0.2, "other": 9.0}, {"oracle": 0.7, "other": 1.0}]]
    win = ImageColor.getrgb(THEMES[theme].win)
    grid = comparison_grid(**ROW, scores=scores, cell=128, theme=theme)
    middle = next(x for x in range(grid.width) if grid.getpixel((x, 100)) == (30, 30, 200))
    frame = np.asarray(grid)[100, middle - 12 : middle]
    assert (frame == np.array(win)).all(axis=-1).any()
    first = next(x for x in range(grid.width) if grid.getpixel((x, 100)) == (200, 30, 30))
    assert not (np.asarray(grid)[100, first - 12 : first] == np.array(win)).all(axis=-1).any()


def test_equal_scores_are_not_marked():
    win = ImageColor.getrgb(THEMES["light"].win)
    tied = comparison_grid(**ROW, scores=[[{"oracle": 0.5}, {"oracle": 0.5}]], cell=128)
    won = comparison_grid(**ROW, scores=[[{"oracle": 0.5}, {"oracle": 0.6}]], cell=128)
    assert count(tied, win) == 0
    assert count(won, win) > 200


def test_small_pictures_keep_hard_pixels_and_large_ones_shrink():
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype("uint8")).convert("RGB")
    assert set(np.unique(np.asarray(fit_width(checker, 256)))) == {0, 255}
    assert fit_width(Image.new("RGB", (1024, 768)), 512).size == (512, 384)
    small = comparison_grid(**{**ROW, "images": [[checker, checker]]})
    large = comparison_grid(**{**ROW, "images": [[Image.new("RGB", (1024, 1024))] * 2]})
    assert small.width < large.width < 1600


def test_rows_may_differ_in_height():
    tall = [[RED, BLUE], [RED.resize((16, 32)), BLUE.resize((16, 32))]]
    one = comparison_grid(**ROW, cell=128).height
    two = comparison_grid(rows=["", ""], columns=["a", "b"], images=tall, captions=["", ""], cell=128).height
    assert two > one + 256


def test_text_never_exceeds_its_room():
    font = load_font(None, False, 15)
    words = "an extraordinarily detailed portrait " * 6 + "w" * 80
    lines = wrap_text(words, font, 180, 5)
    assert len(lines) == 5
    assert lines[-1].endswith("\N{HORIZONTAL ELLIPSIS}")
    assert all(font.getlength(line) <= 180 for line in lines)
    everything = wrap_text(words, font, 180, 99)
    assert "".join(everything).replace(" ", "") == words.replace(" ", "")
    assert shorten("short", font, 180) == "short"
    assert wrap_text("", font, 180, 3) == [""]


def test_title_and_subtitle_take_room():
    plain = comparison_grid(**ROW, cell=128)
    titled = comparison_grid(**ROW, cell=128, title="DPO", subtitle="win rate 60%")
    assert titled.height > plain.height
    assert titled.width == plain.width


def test_the_grid_of_a_comparison(comparison, images):
    grid = grid_of(comparison, images, count=3, cell=64, title="T")
    again = grid_of(comparison, images, count=3, cell=64, title="T")
    assert grid.tobytes() == again.tobytes()
    assert grid.height > 3 * 64
    by_contrast = grid_of(comparison, images, count=3, cell=64, title="T", scorer="contrast")
    assert by_contrast.tobytes() != grid.tobytes()
    del images["dpo"][(0, 0)]
    with pytest.raises(DataError, match='no picture of "dpo" for prompt 0 with seed 0'):
        grid_of(comparison, images, count=3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_formats(tmp_path, suffix):
    grid = comparison_grid(**ROW, cell=64)
    file = save_grid(grid, tmp_path / "deep" / f"grid{suffix}")
    with Image.open(file) as read:
        assert read.size == grid.size
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_formats_that_cannot_hold_the_grid(tmp_path):
    with pytest.raises(UserError, match=r'as "\.bmp"'):
        save_grid(RED, tmp_path / "grid.bmp")
    with pytest.raises(UserError, match=r"at most 16383 pixels a side, the grid has 17000. Use \.png"):
        save_grid(Image.new("RGB", (8, 17_000)), tmp_path / "grid.webp")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [[RED]]}, DataError, "1 rows of 2, but images has 1 rows of 1"),
        ({"captions": []}, DataError, "1 rows but 0 captions"),
        ({"rows": [], "images": [], "captions": []}, DataError, "at least one row"),
        ({"scores": [[{"a": 1.0}, {"b": 1.0}]]}, DataError, "different scorers"),
        ({"theme": "sepia"}, UserError, 'Unknown theme "sepia"'),
        ({"cell": 10}, UserError, "at least 64 pixels, got 10"),
        ({"font": "nowhere.ttf"}, UserError, r"nowhere\.ttf cannot be read"),
    ],
)
def test_requests_that_make_no_grid(changes, error, message):
    with pytest.raises(error, match=message):
        comparison_grid(**{**ROW, **changes})
