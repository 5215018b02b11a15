import datasets
import pytest

from diffalign.data import open_pairs
from diffalign.data.pairs import RowError
from diffalign.errors import DataError
from tests.data.world import picture, rows, write_parquet


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
            assert list(pairs.captions()) == list(local.captions()) == [row.prompt for row in pairs]
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
