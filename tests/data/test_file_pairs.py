import json
import pickle

import pytest

from diffalign.data import open_pairs
from diffalign.data.pairs import ImageRef, RowError
from diffalign.errors import DataError
from tests.data.world import log_of, picture


class TestJsonl:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "images").mkdir()
        for i in range(4):
            (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
        return tmp_path

    def write(self, folder, *lines):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / "pairs.jsonl").write_text(text + "\n")
        return folder / "pairs.jsonl"

    def pair(self, w=0, l=1, **more):  # noqa: E741 (winner and loser)
        return {"prompt": "a cat", "chosen": f"images/{w}.png", "rejected": f"images/{l}.png", **more}

    def test_both_ways_to_write_a_pair(self, folder):
        labelled = {"caption": "a dog", "image_0": "images/2.png", "image_1": "images/3.png"}
        file = self.write(
            folder, self.pair(preference=0.8, tag="x"), "", {**labelled, "label_0": 0}, {**labelled, "label_0": 0.5},
            self.pair(1, 2, preference=0.5), {**labelled, "label_0": 1, "label_1": 0.25}, self.pair(preference=1),
        )  # fmt: skip
        pairs = open_pairs(file)
        assert (pairs.counts.rows, len(pairs), pairs.counts.ties) == (6, 4, 2)
        assert [(r.prompt, r.chosen.path.name, r.rejected.path.name, r.preference) for r in pairs] == [
            ("a cat", "0.png", "1.png", 0.8), ("a dog", "3.png", "2.png", None), ("a dog", "2.png", "3.png", 0.8),
            ("a cat", "0.png", "1.png", None),
        ]  # fmt: skip
        assert pairs[0].extra == {"tag": "x"}
        assert pairs.has_preference is True
        assert pairs[2].chosen.load().tobytes() == ImageRef(data=picture(2)).load().tobytes()
        assert [row.index for row in pickle.loads(pickle.dumps(pairs))] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("line", "reason", "message"),
        [
            ("{broken", "malformed line", "not valid JSON"),
            ("[1, 2]", "malformed line", "got list"),
            ({"prompt": "x", "chosen": "images/0.png"}, "missing column", 'expected "chosen" and "rejected"'),
            ({"chosen": "images/0.png", "rejected": "images/1.png"}, "missing column", 'no "prompt"'),
            ({"prompt": " ", "chosen": "images/0.png", "rejected": "images/1.png"}, "empty caption", "caption is ' '"),
            ({"prompt": "x", "chosen": "images/9.png", "rejected": "images/1.png"}, "missing image", "no file .*9.png"),
            ({"prompt": "x", "chosen": 3, "rejected": "images/1.png"}, "missing image", "an image is 3"),
            ({"prompt": "x", "chosen": "images/0.png", "rejected": "images/1.png", "preference": 0.2}, "preference",
             "preference is 0.2"),
            ({"prompt": "x", "image_0": "images/0.png", "image_1": "images/1.png", "label_0": "a"}, "label",
             "the labels are"),
        ],
    )  # fmt: skip
    def test_bad_lines_are_named_or_skipped(self, folder, line, reason, message):
        file = self.write(folder, self.pair(), line, self.pair(1, 2))
        with pytest.raises(RowError, match=f"pairs.jsonl, line 2: .*{message}"):
            open_pairs(file)
        pairs = open_pairs(file, on_error="skip", error_log=folder / "bad.jsonl")
        assert [row.chosen.path.name for row in pairs] == ["0.png", "1.png"]
        assert pairs.counts.skipped == {reason: 1}
        assert log_of(folder / "bad.jsonl")[0]["row"] == 2

    def test_only_ties_and_empty_files(self, folder):
        with pytest.raises(DataError, match="all of them are ties"):
            open_pairs(self.write(folder, self.pair(preference=0.5)))
        (folder / "pairs.jsonl").write_text("")
        with pytest.raises(DataError, match="is empty"):
            open_pairs(folder / "pairs.jsonl")

    def test_last_line_without_newline_and_max_samples(self, folder):
        file = self.write(folder, self.pair(), self.pair(1, 2), self.pair(2, 3))
        file.write_bytes(file.read_bytes().rstrip())
        assert [row.chosen.path.name for row in open_pairs(file)] == ["0.png", "1.png", "2.png"]
        assert len(open_pairs(file, max_samples=2)) == 2


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        for side, shift in (("w", 0), ("l", 10)):
            (tmp_path / side).mkdir()
            for i in range(3):
                (tmp_path / side / f"{i}.png").write_bytes(picture(i + shift))
        for i in range(3):
            (tmp_path / "w" / f"{i}.txt").write_text(f"caption {i}\n")
        return tmp_path

    def test_winners_and_losers_are_matched_by_stem(self, folder):
        (folder / "l" / "1.png").rename(folder / "l" / "1.webp")
        pairs = open_pairs(folder)
        assert [(r.prompt, r.chosen.path.name, r.rejected.path.name) for r in pairs] == [
            ("caption 0", "0.png", "0.png"), ("caption 1", "1.png", "1.webp"), ("caption 2", "2.png", "2.png"),
        ]  # fmt: skip
        assert pairs[1].chosen.content == picture(1)
        assert pairs[1].rejected.content == picture(11)

    def test_captions_file_wins(self, folder):
        (folder / "captions.json").write_text(json.dumps({"1": "another"}))
        assert [row.prompt for row in open_pairs(folder)] == ["caption 0", "another", "caption 2"]
        (folder / "captions.json").write_text("[]")
        with pytest.raises(DataError, match="must map"):
            open_pairs(folder)

    @pytest.mark.parametrize(
        ("change", "reason", "message"),
        [
            (lambda f: (f / "l" / "1.png").unlink(), "no partner", 'expected one image "1" in .*l, got none'),
            (lambda f: (f / "w" / "1.png").unlink(), "no partner", 'expected one image "1" in .*w, got none'),
            (lambda f: (f / "w" / "1.jpg").write_bytes(b""), "no partner", "got 1.jpg, 1.png"),
            (lambda f: (f / "w" / "1.txt").unlink(), "missing caption", "expected 1.txt"),
            (lambda f: (f / "w" / "1.txt").write_text(" \n"), "empty caption", "caption is ''"),
        ],
    )
    def test_incomplete_pairs_are_named_or_skipped(self, folder, change, reason, message):
        change(folder)
        with pytest.raises(RowError, match=message):
            open_pairs(folder)
        pairs = open_pairs(folder, on_error="skip")
        assert [row.prompt for row in pairs] == ["caption 0", "caption 2"]
        assert pairs.counts.skipped == {reason: 1}

    def test_missing_side(self, tmp_path):
        (tmp_path / "w").mkdir()
        with pytest.raises(DataError, match=r"needs w/ \(winners\) and l/"):
            open_pairs(tmp_path, format="folders")
