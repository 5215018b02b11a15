import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import open_pairs
from diffalign.data.pairs import ImageRef, RowError
from diffalign.data.parquet import ParquetPairs
from diffalign.data.schema import INVALID, TIE, UNLABELLED, judge
from diffalign.errors import DataError
from tests.data.world import picture, rows, write_parquet


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judge_knows_winners_ties_and_nonsense():
    nan = float("nan")
    label_0 = np.array([1, 0, 0.5, 0.7, 0.2, nan, 1, 2, 0.3, 0.5])
    label_1 = np.array([0, 1, 0.5, 0.3, 0.8, nan, 1, 0, 0.3, 0.0])
    winner, preference = judge(label_0, label_1)
    assert winner.tolist() == [0, 1, TIE, 0, 1, UNLABELLED, TIE, INVALID, TIE, TIE]
    np.testing.assert_allclose(preference, [nan, nan, nan, 0.7, 0.8, *[nan] * 5])
    # Without the second column the first says it all.
    assert judge(label_0[:5])[0].tolist() == [0, 1, TIE, 0, 1]


class TestParquet:
    def test_winner_comes_first_and_ties_are_dropped(self, parquet):
        pairs = open_pairs(parquet)
        assert (len(pairs), pairs.counts.rows, pairs.counts.ties, pairs.counts.skipped) == (6, 8, 2, {})
        for row, i in zip(pairs, [0, 1, 3, 4, 6, 7], strict=True):
            assert (row.chosen.data, row.rejected.data) == (picture(i), picture(i + 1))
            assert row.prompt == f"prompt {i // 3}"
            assert row.extra == {"model_0": "one", "model_1": "two"}
            assert row.preference is None
        assert pairs.has_preference is False

    def test_only_the_needed_row_group_is_read(self, tmp_path, monkeypatch):
        read = []
        real = pq.ParquetFile.read_row_group

        def recorded(self, group, columns=None, **options):
            read.append((group, "jpg_0" in columns))
            return real(self, group, columns=columns, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
        pairs = open_pairs(write_parquet(tmp_path / "a.parquet", rows(9)))
        assert read == [(0, False), (1, False), (2, False)]  # opening reads no image
        read.clear()
        assert [pairs[i].prompt for i in (4, 5, 3)] == ["prompt 1"] * 3
        assert read == [(1, True)]
        read.clear()
        monkeypatch.setattr("diffalign.data.parquet.KEPT_BYTES", 1)
        assert [row.index for row in pairs.rows([8, 0, 7, 1])] == [8, 0, 7, 1]
        assert read == [(0, True), (2, True)]  # in file order, each once
        assert len(pairs._groups) == 1

    def test_example_ids_do_not_depend_on_the_order(self, tmp_path):
        data = rows(7)
        straight = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        shuffled = open_pairs(write_parquet(tmp_path / "b.parquet", [data[i] for i in (4, 2, 6, 0, 1, 5, 3)], 2))
        swapped = [
            dict(r, jpg_0=r["jpg_1"], jpg_1=r["jpg_0"], label_0=r["label_1"], label_1=r["label_0"]) for r in data
        ]
        ids = [row.example_id for row in straight]
        assert len({*ids}) == 7
        assert [row.example_id for row in shuffled] == [ids[i] for i in (4, 2, 6, 0, 1, 5, 3)]
        assert [row.example_id for row in open_pairs(write_parquet(tmp_path / "c.parquet", swapped))] == ids

    def test_soft_labels_become_preferences(self, tmp_path):
        data = rows(3)
        data[1] |= {"label_0": 0.25, "label_1": 0.75}
        pairs = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        assert [row.preference for row in pairs] == [None, 0.75, None]
        assert pairs.has_preference is True

    def test_label_1_and_plain_binary_are_optional(self, tmp_path):
        data = [
            {"jpg_0": {"bytes": r["jpg_0"], "path": None}, "jpg_1": {"bytes": r["jpg_1"], "path": None},
             "label_0": int(r["label_0"]), "caption": r["caption"]}
            for r in rows(3)
        ]  # fmt: skip
        pairs = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        assert [row.chosen.data for row in pairs] == [picture(i) for i in range(3)]

    def test_other_column_names(self, tmp_path):
        names = {"jpg_0": "a", "jpg_1": "b", "label_0": "la", "label_1": "lb", "caption": "text"}
        data = [{names.get(k, k): v for k, v in r.items()} for r in rows(2)]
        file = write_parquet(tmp_path / "a.parquet", data)
        settings = {"image_columns": ("a", "b"), "label_columns": ("la", "lb"), "caption_column": "text"}
        assert open_pairs(file, **settings)[1].chosen.data == picture(1)

    def test_missing_columns_list_what_there_is(self, tmp_path):
        data = [{k: v for k, v in r.items() if k != "label_0"} | {"prompt": "x"} for r in rows(2)]
        for row in data:
            del row["caption"]
        with pytest.raises(DataError, match=r'a\.parquet lacks .*"label_0", "caption".* It has: jpg_0, jpg_1, label_1'):
            open_pairs(write_parquet(tmp_path / "a.parquet", data))

    def test_wrong_column_types_are_refused(self, tmp_path):
        with pytest.raises(DataError, match='"caption" holds int64'):
            open_pairs(write_parquet(tmp_path / "a.parquet", rows(2, caption=3)))
        with pytest.raises(DataError, match='"label_0" holds string'):
            open_pairs(write_parquet(tmp_path / "b.parquet", rows(2, label_0="first")))

    @pytest.mark.parametrize("keep", [0, 3, 200, -1, -9])
    def test_truncated_file(self, parquet, keep):
        parquet.write_bytes(parquet.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"pairs\.parquet is no readable parquet file.*truncated"):
            open_pairs(parquet)

    def test_damaged_row_group_names_file_and_row(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", rows(6))
        # Overwrite the page header of the second group's first image column.
        start = pq.ParquetFile(file).metadata.row_group(1).column(0)
        offset = min(start.data_page_offset, start.dictionary_page_offset or start.data_page_offset)
        data = bytearray(file.read_bytes())
        data[offset : offset + 40] = b"\xff" * 40
        file.write_bytes(data)
        pairs = open_pairs(file)
        assert pairs[2].chosen.data == picture(2)
        with pytest.raises(RowError, match=r"a\.parquet, row 3: row group 1 cannot be read"):
            pairs[3]
        skipping = open_pairs(file, on_error="skip")
        assert [row.index for row in skipping] == [0, 1, 2]
        assert skipping.counts.skipped == {"unreadable row group": 3}

    def test_only_ties(self, tmp_path):
        with pytest.raises(DataError, match=r"no usable pair: 4 rows, all of them are ties"):
            open_pairs(write_parquet(tmp_path / "a.parquet", rows(4, label_0=0.5, label_1=0.5)))

    def test_unlabelled_rows_are_counted_not_used(self, tmp_path):
        data = rows(4)
        data[1] |= {"label_0": None, "label_1": None}
        pairs = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        assert (len(pairs), pairs.counts.unlabelled, pairs.counts.ties) == (3, 1, 0)

    @pytest.mark.parametrize("caption", ["", "  \n", None])
    def test_empty_caption_raises_or_is_skipped_and_listed(self, tmp_path, caption):
        data = rows(4)
        data[2]["caption"] = caption
        data[3] |= {"label_0": 3.0}
        file = write_parquet(tmp_path / "a.parquet", data)
        with pytest.raises(RowError, match=r'a\.parquet, row 2: the caption is .*on_error="skip"'):
            open_pairs(file)
        pairs = open_pairs(file, on_error="skip", error_log=tmp_path / "log" / "bad.jsonl")
        assert len(pairs) == 2
        assert pairs.counts.skipped == {"empty caption": 1, "label": 1}
        assert str(pairs.counts) == "4 rows, 2 pairs, 0 ties dropped, 1 skipped (empty caption), 1 skipped (label)"
        first, second = log_of(tmp_path / "log" / "bad.jsonl")
        assert first == {"file": str(file), "row": 2, "unit": "row", "reason": "empty caption",
                         "detail": f"the caption is {caption!r}"}  # fmt: skip
        assert (second["row"], second["reason"]) == (3, "label")

    def test_an_empty_caption_of_a_tie_does_not_matter(self, tmp_path):
        data = rows(3)
        data[1] |= {"caption": "", "label_0": 0.5, "label_1": 0.5}
        assert len(open_pairs(write_parquet(tmp_path / "a.parquet", data))) == 2

    def test_null_image_is_named(self, tmp_path):
        data = rows(3)
        data[1]["jpg_0"] = None
        pairs = open_pairs(write_parquet(tmp_path / "a.parquet", data))
        with pytest.raises(RowError, match="row 1: an image is None"):
            list(pairs)

    def test_max_samples_counts_pairs_and_stops_reading(self, tmp_path):
        for i in range(3):
            write_parquet(tmp_path / f"train-{i:05d}-of-00003.parquet", rows(3, start=3 * i))
        (tmp_path / "train-00002-of-00003.parquet").write_bytes(b"never opened")
        pairs = open_pairs(tmp_path, max_samples=4)
        assert [row.chosen.data for row in pairs] == [picture(i) for i in range(4)]
        assert [file["name"] for file in pairs.identity["files"]] == [f"train-0000{i}-of-00003.parquet" for i in (0, 1)]

    def test_splits_of_a_folder(self, tmp_path):
        write_parquet(tmp_path / "data" / "train-00000-of-00002-aaa.parquet", rows(2))
        write_parquet(tmp_path / "data" / "train-00001-of-00002-bbb.parquet", rows(2, start=2))
        write_parquet(tmp_path / "data" / "validation_unique-00000-of-00001.parquet", rows(3))
        write_parquet(tmp_path / ".cache" / "train-00000-of-00002-aaa.parquet", rows(2))
        assert len(open_pairs(tmp_path)) == 4
        assert len(open_pairs(tmp_path, split="validation_unique")) == 3
        with pytest.raises(DataError, match=r'no parquet files of split "test"; it has train, validation_unique'):
            open_pairs(tmp_path, split="test")

    def test_folders_per_split_own_names_globs_and_lists(self, tmp_path):
        write_parquet(tmp_path / "a" / "train" / "0000.parquet", rows(2))
        write_parquet(tmp_path / "a" / "test" / "0000.parquet", rows(3))
        assert len(open_pairs(tmp_path / "a", split="test")) == 3
        cats, dogs = (write_parquet(tmp_path / "b" / f"{name}.parquet", rows(2)) for name in ("cats", "dogs"))
        assert len(open_pairs(tmp_path / "b")) == 4
        assert len(open_pairs(str(tmp_path / "b" / "c*.parquet"))) == 2
        assert len(open_pairs([cats, str(dogs)])) == 4

    def test_it_can_be_sent_to_worker_processes(self, parquet):
        pairs = open_pairs(parquet)
        read = pairs[0]
        copy = pickle.loads(pickle.dumps(pairs))
        assert copy[0].example_id == read.example_id
        assert len(pickle.dumps(pairs)) < 5000

    def test_index_out_of_range(self, parquet):
        with pytest.raises(IndexError, match="pair 6 of 6"):
            open_pairs(parquet)[6]


@pytest.mark.parametrize(
    ("source", "message"),
    [("/nowhere/pairs.parquet", "no file or folder /nowhere/pairs.parquet"), ("missing.jsonl", "missing.jsonl")],
)
def test_missing_source(source, message):
    with pytest.raises(DataError, match=message):
        open_pairs(source)


def test_misspelt_file_suggests_its_neighbour(parquet):
    with pytest.raises(DataError, match=r'Did you mean "pairs.parquet"'):
        open_pairs(parquet.with_name("pair.parquet"))


def test_wrong_arguments(parquet, tmp_path):
    with pytest.raises(DataError, match=r'Unknown format "picapic".*Did you mean "pickapic"'):
        open_pairs(parquet, format="picapic")
    with pytest.raises(DataError, match='on_error must be "raise" or "skip"'):
        open_pairs(parquet, on_error="ignore")
    with pytest.raises(DataError, match="max_samples"):
        open_pairs(parquet, max_samples=0)
    (tmp_path / "pairs.csv").write_text("x")
    with pytest.raises(DataError, match="Cannot tell what"):
        open_pairs(tmp_path / "pairs.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no parquet file"):
        open_pairs(tmp_path / "empty")


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


class TestHub:
    def test_hub_id_without_network_is_one_clear_error(self):
        message = (
            r'Cannot load "yuvalkirstain/pickapic_v2" \(split "validation", config None, revision main\).*'
            r"hf download yuvalkirstain/pickapic_v2 --repo-type dataset"
        )
        with pytest.raises(DataError, match=message):
            open_pairs("yuvalkirstain/pickapic_v2", split="validation", revision="main")
        with pytest.raises(DataError, match="Cannot load"):
            open_pairs("yuvalkirstain/pickapic_v2", streaming=True)

    def test_the_loader_is_asked_for_exactly_this(self, monkeypatch, parquet):
        asked = []

        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            return datasets.Dataset.from_parquet(str(parquet))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        open_pairs("owner/name", split="test", config_name="big", revision="abc")
        assert asked == [(("owner/name", "big"), {"split": "test", "revision": "abc", "streaming": False})]

    def test_a_loaded_data_set_reads_like_its_file(self, parquet):
        local = open_pairs(parquet)
        dataset = datasets.Dataset.from_parquet(str(parquet))
        decoding = dataset.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
        for source in (dataset, decoding, datasets.DatasetDict(train=dataset)):
            pairs = open_pairs(source)
            assert [row.example_id for row in pairs] == [row.example_id for row in local]
            assert (pairs.counts.ties, pairs.counts.rows) == (2, 8)
            assert pairs[0].extra == local[0].extra
        assert [row.prompt for row in open_pairs(dataset, max_samples=2)] == ["prompt 0"] * 2
        with pytest.raises(DataError, match='no split "test"; it has train'):
            open_pairs(datasets.DatasetDict(train=dataset), split="test")
        with pytest.raises(DataError, match="lacks the column"):
            open_pairs(dataset.remove_columns("jpg_1"))

    def test_identity_follows_the_data(self, parquet):
        dataset = datasets.Dataset.from_parquet(str(parquet))
        assert open_pairs(dataset).identity == open_pairs(dataset).identity
        assert open_pairs(dataset).identity != open_pairs(dataset.select(range(5))).identity


class TestStreaming:
    def test_a_stream_reads_like_its_file(self, parquet):
        local, stream = open_pairs(parquet), open_pairs(parquet, streaming=True)
        assert [row.example_id for row in stream] == [row.example_id for row in local]
        assert (stream.counts.rows, stream.counts.pairs, stream.counts.ties) == (8, 6, 2)
        list(stream)
        assert stream.counts.rows == 8  # a second pass counts nothing twice
        assert [row.index for row in stream.iterate(4)] == [4, 5]

    def test_access_within_the_window_and_behind_it(self, parquet):
        local, stream = open_pairs(parquet), open_pairs(parquet, streaming=True, max_samples=6)
        stream.window = 1
        assert len(stream) == 6
        for index in (3, 2, 5, 0, 4):
            assert stream[index].example_id == local[index].example_id
        assert len(stream._kept) <= 2

    def test_length_must_be_known(self, parquet):
        with pytest.raises(DataError, match="Set max_samples"):
            len(open_pairs(parquet, streaming=True))
        short = open_pairs(parquet, streaming=True, max_samples=9)
        with pytest.raises(DataError, match="holds only 6 usable pairs"):
            short[8]

    def test_faults_are_found_while_reading(self, tmp_path):
        data = rows(4)
        data[1]["caption"] = ""
        file = write_parquet(tmp_path / "a.parquet", data)
        with pytest.raises(RowError, match="row 1: the caption is ''"):
            list(open_pairs(file, streaming=True))
        stream = open_pairs(file, streaming=True, on_error="skip")
        assert [row.chosen.data for row in stream] == [picture(i) for i in (0, 2, 3)]
        assert stream.counts.skipped == {"empty caption": 1}
        with pytest.raises(DataError, match="all of them are ties"):
            list(open_pairs(write_parquet(tmp_path / "t.parquet", rows(2, label_0=0.5, label_1=0.5)), streaming=True))


class TestIdentity:
    def test_content_decides_not_place_or_time(self, parquet, tmp_path):
        before = open_pairs(parquet).identity
        os.utime(parquet, (1, 1))
        moved = tmp_path / "elsewhere" / "pairs.parquet"
        moved.parent.mkdir()
        parquet.rename(moved)
        assert open_pairs(moved).identity == before
        assert json.loads(json.dumps(before))["pairs"] == 6

    def test_one_changed_byte_of_equal_size_and_time_is_noticed(self, parquet, tmp_path):
        os.utime(parquet, (1, 1))
        memo = tmp_path / "memo.sqlite"
        before = open_pairs(parquet).identify(memo)
        data = bytearray(parquet.read_bytes())
        data[100] ^= 1
        parquet.write_bytes(data)
        os.utime(parquet, (1, 1))
        assert open_pairs(parquet).identify(memo) != before

    def test_memo_spares_reading_untouched_files(self, parquet, tmp_path, monkeypatch):
        monkeypatch.setattr("diffalign.data.fingerprints.RACY_SECONDS", -60.0)
        memo = tmp_path / "memo.sqlite"
        before = open_pairs(parquet).identify(memo)
        monkeypatch.setattr("diffalign.data.fingerprints._digest_file", lambda path: "read again")
        assert open_pairs(parquet).identify(memo) == before
        os.utime(parquet)
        assert open_pairs(parquet).identify(memo)["files"][0]["blake2b"] == "read again"
        memo.write_bytes(b"not a database")
        assert open_pairs(parquet).identify(memo)["files"][0]["blake2b"] == "read again"

    def test_young_files_are_not_remembered(self, parquet, tmp_path):
        open_pairs(parquet).identify(tmp_path / "memo.sqlite")
        assert not (tmp_path / "memo.sqlite").exists()

    def test_settings_and_file_order_count(self, tmp_path):
        a, b = (write_parquet(tmp_path / f"{n}.parquet", rows(3, start=s)) for n, s in (("a", 0), ("b", 3)))
        identities = [
            open_pairs(x, **s).identity for x, s in [((a, b), {}), ((b, a), {}), ((a, b), {"max_samples": 6})]
        ]
        assert len({json.dumps(identity) for identity in identities}) == 3

    @pytest.mark.parametrize("name", ["pairs.jsonl", "w/0.png", "l/0.png", "w/0.txt"])
    def test_every_file_of_image_folders_counts(self, tmp_path, name):
        for side, seed in (("w", 0), ("l", 1)):
            (tmp_path / side).mkdir()
            (tmp_path / side / "0.png").write_bytes(picture(seed))
        (tmp_path / "w" / "0.txt").write_text("a cat")
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "a cat", "chosen": "w/0.png", "rejected": "l/0.png"}\n')
        source = tmp_path / "pairs.jsonl" if name != "w/0.txt" else tmp_path
        before = open_pairs(source).identity
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b"cat", b"dog") if b"cat" in content else content + b"\0")
        assert open_pairs(source).identity != before


def test_a_large_file_is_not_held_in_memory(tmp_path, monkeypatch):
    # 16 MB of images in row groups of 500 kB, of which the reader may keep two.
    images = [os.urandom(50_000) for _ in range(5)]
    table = pa.table({"jpg_0": images, "jpg_1": images, "label_0": [1.0] * 5, "caption": ["x"] * 5})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(32):
            writer.write_table(table)
    monkeypatch.setattr("diffalign.data.parquet.KEPT_BYTES", 1_000_000)
    before = pa.total_allocated_bytes()
    pairs = ParquetPairs([tmp_path / "a.parquet"])
    peak = max(pa.total_allocated_bytes() for _ in pairs) - before
    assert len(pairs) == 160
    assert 400_000 < peak < 4_000_000
