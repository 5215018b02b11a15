"""Which files are pictures, in which order, and which files data may name."""

import json
import logging
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from diffalign import pictures
from diffalign.data import open_pairs
from diffalign.errors import DataError
from diffalign.pictures import OutsideError, Reach, listed, nfc
from reward_models.pictures import SUFFIXES

PICTURE = Image.new("RGB", (8, 8), "red")
ACCENT = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(pictures, "_told", set())


def draw(file, colour="red"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file


def pairs_of(folder, *lines, **how):
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a cat", "rejected": "b.png", **line}) + "\n" for line in lines))
    return open_pairs(str(file), **how)


class TestListing:
    def test_what_is_no_picture_is_left_out_and_told_once(self, tmp_path, caplog):
        folder = tmp_path / "pictures"
        for name in ("10.png", "2.PNG", "1.jfif", ".hidden.png", "._2.PNG"):
            draw(folder / name)
        for name in ("a.heic", "b.psd", "2.txt", ".DS_Store", "Thumbs.db", "notes.md"):
            (folder / name).write_bytes(b"?")
        (folder / "folder.png").mkdir()
        os.mkfifo(folder / "pipe.png")
        (folder / "out.png").symlink_to(draw(tmp_path / "secret.png"))
        (folder / "in.png").symlink_to("10.png")
        (folder / "gone.png").symlink_to(folder / "nothing.png")
        with caplog.at_level(logging.WARNING):
            found = listed(folder)
            assert listed(folder) == found
        assert [path.name for path in found] == ["1.jfif", "2.PNG", "10.png", "in.png"]
        (record,) = caplog.records
        assert record.message == (
            f"{folder}: left out 8 file(s): 1 .heic without a reader (pip install pillow-heif), 1 .psd not read, "
            "2 hidden, 1 leading out of the folder, 3 no regular file."
        )

    def test_order_does_not_depend_on_the_file_system(self, tmp_path, monkeypatch):
        names = ["b.png", "A.png", "a.png", "2.png", "010.png", "10.png", f"{ACCENT}.png"]
        for name in names:
            draw(tmp_path / name)
        found = listed(tmp_path)
        monkeypatch.setattr(Path, "iterdir", lambda self: (self / name for name in sorted(names, reverse=True)))
        assert listed(tmp_path) == found
        assert [path.name for path in found[:3]] == ["2.png", "010.png", "10.png"]

    def test_endings_follow_the_readers(self):
        assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= {*SUFFIXES}
        assert not {".eps", ".ps", ".pdf", ".ico", ".tga", ".psd"} & {*SUFFIXES}

    def test_accents_match_however_they_are_written(self, tmp_path):
        composed, apart = (unicodedata.normalize(form, ACCENT) for form in ("NFC", "NFD"))
        draw(tmp_path / "w" / f"{apart}.png", "green")
        draw(tmp_path / "l" / f"{composed}.png")
        (tmp_path / "captions.json").write_text(json.dumps({composed: "a cat"}))
        (pair,) = open_pairs(str(tmp_path))
        assert pair.chosen.load().getpixel((0, 0)) == (0, 128, 0)
        draw(tmp_path / "b.png")
        (row,) = pairs_of(tmp_path, {"chosen": f"w/{composed}.png"})
        assert row.chosen.path.name == f"{apart}.png"
        assert nfc(apart) == composed


class TestReach:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("data/a.png", "data/b.png", "data/more/c.png", "outside/secret.png"):
            draw(tmp_path / name)
        (tmp_path / "data" / "link.png").symlink_to("../outside/secret.png")
        (tmp_path / "data" / "way").symlink_to(tmp_path / "outside")
        (tmp_path / "data" / "kept.png").symlink_to("more/c.png")
        return tmp_path / "data"

    @pytest.mark.parametrize("name", ["a.png", "./more/../a.png", "more/c.png", "kept.png"])
    def test_files_beside_the_data_are_read(self, folder, name):
        assert Reach(folder).file(name).is_file()
        assert Reach(folder).file(folder / name).is_file()
        (row,) = pairs_of(folder, {"chosen": name})
        assert row.chosen.load().size == (8, 8)

    @pytest.mark.parametrize(
        "name", ["../outside/secret.png", "link.png", "way/secret.png", "more/../../outside/secret.png", "/etc/passwd"]
    )
    def test_others_are_not(self, folder, name):
        with pytest.raises(OutsideError, match=r"leads out of .*data.*--root"):
            Reach(folder).file(name)
        pairs = pairs_of(folder, {"chosen": name}, {"chosen": "a.png"}, on_error="skip")
        assert len(pairs) == 1
        assert pairs.counts.skipped == {"outside the folder": 1}
        with pytest.raises(DataError, match=r"line 1: .*leads out of"):
            pairs_of(folder, {"chosen": name})

    def test_a_root_widens_it(self, folder):
        (row,) = pairs_of(folder, {"chosen": "../outside/secret.png"}, root=folder.parent)
        assert row.chosen.load().size == (8, 8)
        with pytest.raises(DataError, match="root must be a folder"):
            pairs_of(folder, {"chosen": "a.png"}, root=folder / "none")

    @pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "n" * 5000, "x/" * 3000])
    def test_no_name_is_too_odd(self, folder, name):
        pairs = pairs_of(folder, {"chosen": name}, {"chosen": "a.png"}, on_error="skip")
        assert len(pairs) == 1
        assert sum(pairs.counts.skipped.values()) == 1

    def test_links_of_the_hub_cache_belong_to_their_repository(self, tmp_path):
        blob = draw(tmp_path / "datasets--x" / "blobs" / "abc")
        snapshot = tmp_path / "datasets--x" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "a.png").symlink_to(blob)
        (snapshot / "b.png").symlink_to(draw(tmp_path / "datasets--y" / "blobs" / "abc"))
        assert Reach(snapshot).file("a.png").is_file()
        with pytest.raises(OutsideError):
            Reach(snapshot).file("b.png")

    def test_winners_elsewhere_need_a_root(self, folder):
        (folder / "w").symlink_to(folder.parent / "outside")
        draw(folder / "l" / "secret.png")
        (folder / "captions.json").write_text('{"secret": "a cat"}')
        with pytest.raises(OutsideError, match="w leads out of"):
            open_pairs(str(folder))
        assert len(open_pairs(str(folder), root=folder.parent)) == 1


def test_no_list_or_caption_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match="no regular file"):
        open_pairs(str(tmp_path / "pairs.jsonl"))
    for side in "wl":
        draw(tmp_path / side / "a.png")
    os.mkfifo(tmp_path / "w" / "a.txt")
    os.mkfifo(tmp_path / "captions.json")
    with pytest.raises(DataError, match=r"expected a\.txt beside it"):
        open_pairs(str(tmp_path))


def test_a_caption_as_long_as_a_book_is_one_rejected_row(tmp_path):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
    pairs = pairs_of(tmp_path, {"chosen": "a.png", "prompt": "x" * 100_001}, {"chosen": "a.png"}, on_error="skip")
    assert (len(pairs), pairs.counts.skipped) == (1, {"caption length": 1})


def test_deep_nesting_is_one_rejected_row(tmp_path):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
    file = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"})
    file.write_text(good + "\n" + "[" * 200_000 + "\n" + good + "\n")
    pairs = open_pairs(str(file), on_error="skip")
    assert (len(pairs), pairs.counts.skipped) == (2, {"malformed line": 1})


def test_pictures_are_opened_in_one_place():
    """But for the bytes that the embedded world has just encoded itself."""
    root = Path(__file__).parent.parent
    files = [file for package in ("diffalign", "reward_models") for file in (root / package).rglob("*.py")]
    found = {file.relative_to(root).as_posix() for file in files if "Image.open(" in file.read_text(encoding="utf-8")}
    assert found - {"diffalign/jobs/world/world_data.py"} == {"reward_models/pictures.py"}
