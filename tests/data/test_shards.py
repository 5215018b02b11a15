"""The first pairs of a hub data set take no more of its files than they are in."""

import datasets
import huggingface_hub
import pytest

from diffalign.data import open_pairs, readers
from diffalign.errors import DataError
from tests.data.world import rows, write_parquet

FILES = 4


@pytest.fixture
def folder(tmp_path):
    """Return a data set of four files with five pairs each, laid out as on the hub."""
    for number in range(FILES):
        write_parquet(tmp_path / "set" / f"train-{number:05d}-of-{FILES:05d}.parquet", rows(5, start=5 * number))
    return tmp_path / "set"


@pytest.fixture
def downloaded(monkeypatch):
    """Let any name be that of a data set on the hub, and return a list to which every file that is fetched is added."""
    fetched, download = [], datasets.DownloadManager.download

    def counting(self, url):
        fetched.append(url.rpartition("/")[2])
        return download(self, url)

    monkeypatch.setattr(datasets.DownloadManager, "download", counting)
    monkeypatch.setattr(readers, "is_hub_id", lambda source: True)
    return fetched


@pytest.mark.parametrize(("wanted", "files"), [(3, 1), (5, 1), (6, 2), (99, 4)])
def test_only_the_files_that_are_needed_are_downloaded(folder, downloaded, wanted, files):
    pairs = open_pairs(str(folder), max_samples=wanted)
    assert set(downloaded) == {f"train-{number:05d}-of-{FILES:05d}.parquet" for number in range(files)}
    assert len(pairs) == min(wanted, 5 * FILES)
    assert pairs.name == str(folder)


def test_they_read_like_the_files_themselves(folder, downloaded, monkeypatch):
    first = open_pairs(str(folder), max_samples=7)
    monkeypatch.undo()
    local = open_pairs(folder, max_samples=7)
    assert [row.example_id for row in first] == [row.example_id for row in local]
    assert first.identity == local.identity  # so is the cache made of them
    assert list(first.captions()) == [row.prompt for row in local]


def test_an_absent_split_is_named(folder, downloaded):
    with pytest.raises(DataError, match='has no split "test"; it has train'):
        open_pairs(str(folder), split="test", max_samples=1)
    assert downloaded == []


def test_without_a_network_files_that_were_downloaded_before_are_read(folder, monkeypatch, tmp_path):
    snapshot = tmp_path / "hub" / "datasets--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DataError, match='Cannot load "owner/name"'):
        open_pairs("owner/name", max_samples=7)
    for name in sorted(file.name for file in folder.iterdir())[:2]:
        (folder / name).rename(snapshot / name)
    assert len(open_pairs("owner/name", max_samples=7)) == 7


def test_other_formats_are_streamed(tmp_path, downloaded, monkeypatch):
    asked = []

    def load(name, **how):
        asked.append(how["streaming"])
        raise DataError("as far as this test goes")

    monkeypatch.setattr(readers, "load_hub", load)
    (tmp_path / "train.jsonl").write_text('{"caption": "a"}\n')
    for limit in (5, None):
        with pytest.raises(DataError, match="as far as"):
            open_pairs(str(tmp_path), max_samples=limit)
    assert asked == [True, False]
