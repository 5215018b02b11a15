"""The parquet files of a hub data set one at a time: the first pairs of a large set without all of it."""

from collections.abc import Sequence
from pathlib import Path

from diffalign.data.hub import reaching
from diffalign.errors import DataError


class Shards(Sequence[Path]):
    """Hold the parquet files of a split on the hub, in order; each is downloaded when it is asked for.

    Whoever reads them one after another and stops leaves the rest where it is. What was downloaded stays in the cache
    of `huggingface_hub`; files on this machine are taken as they are.
    """

    def __init__(self, name: str, urls: Sequence[str], **where: str | None):
        import datasets

        self.name, self.urls, self._where = name, list(urls), where
        self._manager = datasets.DownloadManager(dataset_name=name)

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, index: int) -> Path:
        with reaching(self.name, **self._where):
            return Path(self._manager.download(self.urls[index]))


def files_of(name: str, *, split: str, config_name: str | None, revision: str | None) -> list[str]:
    """Return where the files of a split are, of which none is downloaded; [] where only `datasets` knows.

    Raises:
        DataError: the data set cannot be reached, or has no such split.
    """
    import datasets

    with reaching(name, split=split, config_name=config_name, revision=revision):
        files = datasets.load_dataset_builder(name, config_name, revision=revision).config.data_files or {}
    if split in files:
        return [str(url) for url in files[split]]
    if files and "[" not in split:  # a slice such as train[:10%] is for `datasets` to understand
        raise DataError(f'"{name}" has no split "{split}"; it has {", ".join(map(str, files))}.')
    return []


def downloaded_snapshot(name: str, revision: str | None, repo_type: str = "dataset") -> Path | None:
    """Return the folder with those files of a hub repository that were downloaded before; None if there are none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
