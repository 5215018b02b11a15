"""Grids of any length: what is in memory is one page, and every row is on some page."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DataError, UserError
from diffalign.evaluation import Look, save_pages
from diffalign.evaluation.typesetting import THEMES

ROOT = Path(__file__).parents[2]
COLOURS = [(40 * i, 255 - 40 * i, 90) for i in range(6)]


@pytest.fixture
def files(tmp_path):
    """Return six pictures, each of one colour."""
    paths = [tmp_path / f"{number}.png" for number in range(len(COLOURS))]
    for path, colour in zip(paths, COLOURS, strict=True):
        Image.new("RGB", (64, 64), colour).save(path)
    return paths


def write(out, files, rows=6, **options):
    images = [[files[row % 6]] for row in range(rows)]
    parts = [f"seed {row}" for row in range(rows)], ["base"], images, ["a prompt"] * rows
    return save_pages(out, *parts, look=Look(cell=64, title="T"), **options)


def test_one_page_is_the_file_itself(files, tmp_path):
    assert write(tmp_path / "grid.png", files) == [tmp_path / "grid.png"]


def test_every_row_is_on_one_of_the_pages_in_order(files, tmp_path):
    pages = write(tmp_path / "out" / "grid.png", files, page_pixels=36_000)
    assert [page.name for page in pages] == [f"grid-{i}.png" for i in range(1, len(pages) + 1)]
    assert len(pages) > 1
    seen = []
    for page in pages:
        with Image.open(page) as opened:
            assert opened.width * opened.height <= 36_000
            pixels = np.asarray(opened.convert("RGB"))
        column = [tuple(pixel) for pixel in pixels[:, -20].tolist()]
        seen += [colour for colour in dict.fromkeys(column) if colour in COLOURS]
    assert seen == COLOURS
    assert THEMES["light"].background == "#ffffff"


def test_a_long_pdf_has_pages(files, tmp_path):
    (file,) = write(tmp_path / "grid.pdf", files, rows=30)
    counts = re.findall(rb"/Count (\d+)", file.read_bytes())
    assert int(counts[-1]) > 3
    assert [path.name for path in tmp_path.glob(".grid*")] == []


def test_a_row_too_high_for_a_page_gets_one_of_its_own(files, tmp_path):
    assert len(write(tmp_path / "grid.jpg", files, page_pixels=10)) == 6


def test_what_cannot_be_written(files, tmp_path):
    with pytest.raises(UserError, match=r'as "\.bmp"'):
        write(tmp_path / "grid.bmp", files)
    files[3].unlink()
    with pytest.raises(DataError, match=r"3\.png cannot be read"):
        write(tmp_path / "grid.png", files)
    assert not (tmp_path / "grid.png").exists()


def test_two_thousand_cells_take_no_more_memory_than_a_page(files, tmp_path):
    growth = {}
    for pixels in (10**6, 10**9):
        command = [sys.executable, "-m", "tests.evaluation.page_memory", str(tmp_path), str(pixels)]
        growth[pixels] = float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    assert len(list((tmp_path / f"grid-{10**6}").iterdir())) >= 12
    assert len(list((tmp_path / f"grid-{10**9}").iterdir())) == 1
    assert growth[10**6] < 12 < 30 < growth[10**9]
