"""Preferences on the Hugging Face hub, downloaded or streamed through `datasets`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from diffalign.data.pair_schemas import Columns
from diffalign.data.pairs import Example, Place, RowError
from diffalign.data.rejects import Rejects
from diffalign.data.schema import TIE, Scan, TableSchema
from diffalign.data.source import PairSource
from diffalign.errors import DataError
from diffalign.pictures import Reach

if TYPE_CHECKING:
    import datasets

SCAN_ROWS = 10_000


def load_hub(
    name: str, *, split: str, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """Load a data set from the hub. Raises DataError when it cannot be reached or has no such split."""
    # Here and below: importing datasets takes about a second, which readers of local files need not wait.
    import datasets

    with reaching(name, split=split, config_name=config_name, revision=revision):
        return datasets.load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)


@contextmanager
def reaching(name: str, *, split: str, config_name: str | None, revision: str | None) -> Iterator[None]:
    """Turn what `datasets` raises about a data set on the hub into a DataError."""
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f'Cannot load "{name}" (split "{split}", config {config_name}, revision {revision}) from the Hugging Face '
            f"hub: {error} Check the names. A machine without network needs the files: run "
            f"`hf download {name} --repo-type dataset --local-dir DIR` elsewhere and pass DIR."
        ) from error


def hub_revision(name: str, revision: str | None) -> str:
    """Return the commit a hub data set stands at, so that a cache made from a moving branch is never stale."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (OSError, ValueError) as error:
        raise DataError(f'Cannot ask the Hugging Face hub for the commit of "{name}": {error}') from error


def cache_reach(wider: tuple[Path, ...] = ()) -> Reach:
    """Return which files the rows of a data set may name: what `datasets` keeps on this machine, and `wider`."""
    from datasets import config
    from huggingface_hub import constants

    homes = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return Reach(Path(config.HF_DATASETS_CACHE), (*wider, *map(Path, homes)))


class HubPairs(PairSource):
    """Read a `datasets.Dataset`: memory-mapped Arrow files, fast to jump about in."""

    def __init__(
        self,
        dataset: "datasets.Dataset",
        schema: TableSchema | None = None,
        *,
        name: str = "dataset",
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
        reach: Reach | None = None,
    ):
        self.schema = schema or Columns()
        super().__init__(rejects, self.schema)
        self.name, self.max_samples, self._reach = name, max_samples, reach or cache_reach(wider)
        self.schema.require(dataset.column_names, name)
        self._fingerprint = dataset._fingerprint  # the hash under which datasets itself caches: origin and processing
        self._dataset = undecoded(dataset, self.schema).with_format(None)
        kept = self._scan().finish(self.rejects, name, max_samples, self.images_per_example)
        self._rows, self.images_per_example = kept
        self._check_usable()

    def _scan(self) -> Scan:
        light = self._dataset.select_columns(self.schema.light(self._dataset.column_names)).with_format("arrow")
        scan, enough = Scan(), self.max_samples or len(light)
        for table in light.iter(SCAN_ROWS):
            scan.add(table, self.schema, self.name)
            if sum(map(len, scan.keep)) >= enough:
                break
        self.has_preference = scan.soft
        return scan

    def __len__(self) -> int:
        return len(self._rows)

    def _fetch(self, index: int) -> Example:
        row = int(self._rows[index])
        place = Place(self.name, row)
        try:
            record = self._dataset[row]
        except (pa.ArrowException, OSError) as error:
            raise RowError(place, "unreadable row", f"cannot be read ({error})") from error
        return self.schema.read(record, index, place, self._reach)

    def captions(self) -> Iterator[str]:
        """Yield the captions of the examples, reading no other column."""
        captions = self._dataset.select_columns(list(self.schema.caption_columns)).select(self._rows)
        for table in captions.with_format("arrow").iter(SCAN_ROWS):
            for column in table.columns:
                yield from column.to_pylist()

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        return {
            "format": "datasets",
            "fingerprint": self._fingerprint,
            "columns": self.schema.identity,
            "max_samples": self.max_samples,
            "pairs": len(self),
        }


class UnknownLength(DataError, TypeError):
    """Report that a stream has no length. Also a TypeError: `list(stream)` asks for a length and can do without."""


class StreamingPairs(PairSource):
    """Read a `datasets.IterableDataset` in order, without keeping it.

    A LatentCache can be built from it: one pass. For training without a cache, pass `window` on to PairSampler, which
    then shuffles within that many consecutive pairs: those are kept in memory, encoded. A step back beyond them
    starts the stream anew. The number of pairs is known only if `max_samples` says it.
    """

    def __init__(
        self,
        dataset: "datasets.IterableDataset",
        schema: TableSchema | None = None,
        *,
        name: str = "stream",
        describe: Callable[[Path | None], dict[str, Any]],
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
        reach: Reach | None = None,
        window: int = 256,
    ):
        self.schema = schema or Columns()
        super().__init__(rejects, self.schema)
        self.has_preference = None if self.schema.unit == "pairs" else False
        self.name, self.max_samples, self.window = name, max_samples, window
        self._dataset, self._origin = undecoded(dataset, self.schema), describe
        self._reach = reach or cache_reach(wider)
        self._counted = 0  # rows counted so far: a second pass counts nothing twice
        self._restart()

    def __len__(self) -> int:
        if self.max_samples is None:
            raise UnknownLength(
                f"The number of pairs in the stream {self.name} is not known beforehand. Set max_samples to use so "
                "many of them, or build a latent cache from it."
            )
        return self.max_samples

    def _restart(self) -> None:
        self._ahead, self._next, self._kept = None, 0, {}

    def _fetch(self, index: int) -> Example:
        if index in self._kept:
            return self._kept[index]
        if self._ahead is None or index < self._next:
            self._restart()
            self._ahead = self._pairs()
        for row in self._ahead:
            self._kept[row.index] = row
            self._next = row.index + 1
            self._kept.pop(row.index - 2 * self.window, None)
            if row.index == index:
                return row
        raise DataError(f"The stream {self.name} holds only {self._next} usable pairs, but max_samples asks for more.")

    def iterate(self, start: int = 0) -> Iterator[Example]:
        """Yield the pairs from `start` on, in one pass over the stream."""
        for row in self._pairs():
            if row.index >= start:
                yield row

    def _pairs(self) -> Iterator[Example]:
        index = 0
        for number, record in enumerate(self._records()):
            row = self._judge(record, index, Place(self.name, number), fresh=number >= self._counted)
            self._counted = max(self._counted, number + 1)
            if row is not None:
                index += 1
                yield row
                if index == self.max_samples:
                    return
        if index == 0:
            self._check_usable()

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._dataset
        except (pa.ArrowException, OSError, RuntimeError, UnicodeDecodeError) as error:
            raise DataError(f"The stream {self.name} broke off: {error} Finished work is kept; run again.") from error

    def _judge(self, record: dict[str, Any], index: int, place: Place, *, fresh: bool) -> Example | None:
        """Return the example, or None for a row without one; count the row if it is seen for the first time."""
        if place.row == 0:
            self.schema.require(record, self.name)
        self.counts.rows += fresh
        try:
            row = self.fitting(self.schema.read(record, index, place, self._reach), place)
        except RowError as error:
            self.rejects.add(error)
            return None
        if isinstance(row, int):
            self.counts.ties += fresh and row == TIE
            self.counts.unlabelled += fresh and row != TIE
            return None
        self.counts.pairs += fresh
        return row

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        origin = {"format": "stream", "columns": self.schema.identity, "max_samples": self.max_samples}
        return {**origin, **self._origin(memo)}


def undecoded(
    dataset: "datasets.Dataset | datasets.IterableDataset", schema: TableSchema
) -> "datasets.Dataset | datasets.IterableDataset":
    """Return the data set with its image columns as encoded bytes: decoding is ours, late and once."""
    import datasets

    for name in schema.image_columns:
        feature = (dataset.features or {}).get(name)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset
