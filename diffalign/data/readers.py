"""Open preferences, whatever holds them."""

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.data.fingerprints import digest_files
from diffalign.data.hub import HubPairs, StreamingPairs, hub_revision, load_hub
from diffalign.data.lists import ListColumns, SingleColumns
from diffalign.data.local_files import FolderPairs, JsonlPairs
from diffalign.data.pair_schemas import Columns, PairLines
from diffalign.data.parquet import ParquetPairs, open_parquet
from diffalign.data.rejects import Rejects
from diffalign.data.schema import TableSchema
from diffalign.data.shards import Shards, downloaded_snapshot, files_of
from diffalign.data.source import PairSource
from diffalign.errors import DataError, suggestion
from diffalign.places import find, is_hub_id
from diffalign.text_files import mapped, numbered_lines, parse_json

PARQUET = ".parquet"
FORMATS = ("pickapic", "jsonl", "folders", "lists", "singles")
# train-00000-of-00645-b66ac786bf6fb553.parquet, train-00000.parquet or train.parquet: split "train".
SHARD = re.compile(r"-\d+-of-\d+")
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "validation_unique", "test_unique"}
SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z_]\w*?)(?:-\d+(?:-of-\d+)?(?:-\w+)?)?\.(?i:parquet)")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Say how preferences are read, and what their columns mean.

    Raises:
        DataError: an unknown format, or no example at all.
    """

    split: str = "train"  # of a hub data set, or of a folder whose parquet files are named after splits
    format: str | None = None  # of FORMATS; None tells by what the source is and by its columns
    image_columns: Sequence[str] | None = None  # default ("jpg_0", "jpg_1"), in JSONL ("image_0", "image_1")
    label_columns: Sequence[str] = ("label_0", "label_1")  # the second may be absent from the data
    caption_column: str = "caption"  # JSONL files may also call it "prompt"
    image_caption_columns: Sequence[str] | None = None  # of the two images of a pair (DCPO), in place of caption_column
    list_labels: str = "win_rate"  # turns the scores of a list into win rates; "as_is" takes them, in [0, 1]
    max_samples: int | None = None  # use the first so many examples (ties do not count)
    streaming: bool = False  # read a hub data set or parquet files as a stream instead of at random
    on_error: str = "raise"  # at the first unusable row, or "skip": count it, list it and go on
    error_log: str | Path | None = None  # JSONL file for the unusable rows
    config_name: str | None = None  # configuration of a hub data set
    revision: str | None = None  # branch, tag or commit of a hub data set

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise DataError(f"max_samples must be at least 1 or None, got {self.max_samples}.")
        if self.format is not None and self.format not in FORMATS:
            hint = suggestion(self.format, FORMATS)
            raise DataError(f'Unknown format "{self.format}".{hint} Available: {", ".join(FORMATS)}.')

    def of_table(self, found: Iterable[str]) -> TableSchema:
        """Return the schema of parquet or of the hub: as the format says, or by the columns there are."""
        return self._schema(Columns, self.image_columns or Columns.images, found)

    def of_lines(self, file: Path) -> TableSchema:
        """Return the schema of a JSONL file."""
        return self._schema(PairLines, self.image_columns or ("image_0", "image_1"), _first_keys(file))

    def _schema(self, pairs: type[Columns], images: Sequence[str], found: Iterable[str]) -> TableSchema:
        found = set(found)
        lists = ListColumns(caption=self.caption_column, list_labels=self.list_labels)
        schemas = {"lists": lists, "singles": SingleColumns(caption=self.caption_column)}
        told = self.format or self._told_by(found, images)
        captions = tuple(self.image_caption_columns) if self.image_caption_columns else None
        if told not in schemas:
            columns = {"images": tuple(images), "labels": tuple(self.label_columns)}
            return _with_noises(pairs(caption=self.caption_column, image_captions=captions, **columns), found)
        if captions:
            raise DataError(f'image_caption_columns is for pairs, but these are {told} (format "{told}").')
        return _with_noises(schemas[told], found)

    @staticmethod
    def _told_by(found: set[str], images: Sequence[str]) -> str | None:
        if found.issuperset(images) or found.issuperset(("chosen", "rejected")):
            return None
        return "lists" if "images" in found else "singles" if found.issuperset(("image", "label")) else None


def _with_noises(schema: TableSchema, found: set[str]) -> TableSchema:
    """Return the schema that also reads what images were drawn from, where the columns say it."""
    names = next((names for names in schema.noise_names if found.issuperset(names)), None)
    return schema if names is None else replace(schema, noises=names)


def open_pairs(source: str | Path | Sequence[str | Path], **how: Any) -> PairSource:
    """Open preference pairs (winner first), lists of images (best first) or single labelled images.

    Ties are dropped and counted. Example: `open_pairs("assets/tiny-pairs", max_samples=100)`.

    Args:
        source: a parquet file, several, a glob pattern or a folder of them; a JSONL file; a folder with w/ and l/; a
            Hugging Face data set id "owner/name"; or a loaded `datasets.Dataset` or `DatasetDict`.
        how: the fields of `Reading`.

    Raises:
        DataError: missing or truncated files, missing columns, unusable rows (the first is named), no usable pair.
    """
    reading = Reading(**how)
    settings = {"max_samples": reading.max_samples, "rejects": Rejects(reading.on_error, reading.error_log)}
    if isinstance(source, Mapping):
        if reading.split not in source:
            raise DataError(f'The data set has no split "{reading.split}"; it has {", ".join(source)}.')
        source = source[reading.split]
    if hasattr(source, "column_names"):
        return HubPairs(source, reading.of_table(source.column_names), **settings)
    if isinstance(source, str | Path) and (found := find(source)):
        source = str(found)
    container = _container(source, reading.format)
    if container == "folders":
        if reading.image_caption_columns:
            raise DataError("image_caption_columns needs parquet or JSONL: folders hold one caption a pair.")
        return FolderPairs(_existing(source), **settings)
    if container == "jsonl":
        file = _existing(source)
        return JsonlPairs(file, reading.of_lines(file), **settings)
    if is_hub_id(source):
        return _open_hub(str(source), reading, **settings)
    return _open_files(parquet_files(source, reading.split), reading, **settings)


def _open_hub(source: str, reading: Reading, **settings: Any) -> PairSource:
    where = {name: getattr(reading, name) for name in ("split", "config_name", "revision")}
    streaming = reading.streaming
    if reading.max_samples is not None and not streaming:  # no more is downloaded than is read
        files = _first_files(source, where)
        if files and all(str(file).lower().endswith(PARQUET) for file in files):
            parquet = Shards(source, files, **where) if isinstance(files[0], str) else files
            return _open_files(parquet, reading, name=source, **settings)
        streaming = bool(files)
    dataset = load_hub(source, **where, streaming=streaming)
    schema = reading.of_table(dataset.column_names or ())
    if not streaming:
        return HubPairs(dataset, schema, name=source, **settings)
    origin = {"dataset": source, **where, "commit": hub_revision(source, reading.revision)}
    return StreamingPairs(dataset, schema, name=source, describe=lambda memo: origin, **settings)


def _first_files(source: str, where: dict[str, str | None]) -> list[str] | list[Path]:
    """Return the files of a hub data set: their addresses, or without a network those that were downloaded before."""
    try:
        return files_of(source, **where)
    except DataError:
        snapshot = downloaded_snapshot(source, where["revision"]) if where["config_name"] is None else None
        if snapshot is None or not any(snapshot.rglob(f"*{PARQUET}")):
            raise
        return parquet_files(snapshot, where["split"])


def _open_files(files: Sequence[Path], reading: Reading, **settings: Any) -> PairSource:
    with open_parquet(files[0]) as parquet:
        schema = reading.of_table(parquet.schema_arrow.names)
    return _stream_files(files, schema, **settings) if reading.streaming else ParquetPairs(files, schema, **settings)


def _first_keys(file: Path) -> list[str]:
    """Return the keys of the first line that holds an object; faulty lines are reported by the reader."""
    for _, _, line in numbered_lines(mapped(file)):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return list(record)
    return []


def _stream_files(files: list[Path], schema: TableSchema, **settings) -> StreamingPairs:
    import datasets

    for file in files:
        with open_parquet(file) as parquet:
            schema.require(parquet.schema_arrow.names, str(file))
    names = [str(file) for file in files]
    stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)

    def describe(memo: Path | None) -> dict:
        return {"files": [[f.name, digest] for f, digest in zip(files, digest_files(files, memo), strict=True)]}

    return StreamingPairs(stream, schema, name=str(files[0].parent), describe=describe, **settings)


def parquet_files(source: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """Return the parquet files `source` stands for, sorted; of a folder named after splits, those of `split`."""
    if not isinstance(source, str | Path):
        files = [_existing(file) for file in source]
        if not files:
            raise DataError("The list of parquet files is empty.")
        return files
    if glob.has_magic(str(source)) and not Path(source).exists():
        files = sorted(Path(file) for file in glob.glob(str(source), recursive=True))
        if not files:
            raise DataError(f"No file matches {source}.")
        return files
    root = _existing(source)
    if root.is_file():
        return [root]
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() == PARQUET and not _is_hidden(f, root))
    if not files:
        raise DataError(f"{root} holds no parquet file.")
    splits = {file: _split_of(file, root) for file in files}
    found = sorted({*splits.values()})
    named_after_splits = not SPLITS.isdisjoint(found) or any(SHARD.search(file.name) for file in files)
    if split == "train" and not named_after_splits:
        return files  # cats.parquet, dogs.parquet: names of our user's own
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        raise DataError(
            f'{root} has no parquet files of split "{split}"; it has {", ".join(found)}.{suggestion(split, found)}'
        )
    return chosen


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _split_of(file: Path, root: Path) -> str:
    """Return the split a file belongs to: the folder it is in (train/0000.parquet) or the start of its name."""
    match = SPLIT_FILE.fullmatch(file.name)
    return match["split"] if match else file.parent.name if file.parent != root else "unnamed"


def _container(source: str | Path | Sequence[str | Path], format: str | None) -> str:
    """Return what holds the rows: "parquet" (the hub's too), "jsonl" or "folders"."""
    if format in ("jsonl", "folders"):
        return format
    if format == "pickapic" or not isinstance(source, str | Path):
        return "parquet"
    path = Path(source)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "jsonl"
    if format is None and (path / "w").is_dir() and (path / "l").is_dir():
        return "folders"
    if path.is_file() and path.suffix.lower() != PARQUET:
        if format is not None:
            return "jsonl"
        raise DataError(
            f"Cannot tell what {path} is: expected .parquet or .jsonl. Set format to one of {', '.join(FORMATS)}."
        )
    return "parquet"


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"There is no file or folder {path}.{suggestion(path.name, near)}")
