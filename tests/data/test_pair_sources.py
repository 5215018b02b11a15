import json
import os

import pytest

from diffalign.data import open_pairs
from diffalign.errors import DataError
from tests.data.world import picture, rows, write_parquet


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
    (tmp_path / "pairs.xls").write_text("x")
    with pytest.raises(DataError, match="Cannot tell what"):
        open_pairs(tmp_path / "pairs.xls")
    (tmp_path / "pairs.csv").write_text("chosen,rejected,prompt\n")
    with pytest.raises(DataError, match=r"pairs\.csv is empty"):
        open_pairs(tmp_path / "pairs.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no parquet file"):
        open_pairs(tmp_path / "empty")


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
