import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import open_pairs
from diffalign.data.pair_schemas import judge
from diffalign.data.pairs import RowError
from diffalign.data.parquet import ParquetPairs
from diffalign.data.schema import INVALID, TIE, UNLABELLED
from diffalign.errors import DataError
from tests.data.world import log_of, picture, rows, write_parquet


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
        with pytest.raises(DataError, match=r'a\.parquet lacks .*"label_0".* It has: jpg_0, jpg_1, label_1'):
            open_pairs(write_parquet(tmp_path / "a.parquet", data))

    def test_wrong_column_types_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"row 0: the caption is 3 \(int\), expected text"):
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
