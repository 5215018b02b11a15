"""Open preferences, whatever holds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.fingerprints import digest_files
from diffalign.data.hub import HubPairs, StreamingPairs, hub_revision, load_hub
from diffalign.data.local_files import FolderPairs, JsonlPairs
from diffalign.data.parquet import ParquetPairs, open_parquet
from diffalign.data.parquet_files import PARQUET, below, existing, matching, parquet_files
from diffalign.data.reading import FORMATS, Reading
from diffalign.data.records import RecordPairs, metadata_file
from diffalign.data.rejects import Rejects
from diffalign.data.saved import ARROW, is_saved, open_saved
from diffalign.data.schema import TableSchema
from diffalign.data.shards import Shards, downloaded_snapshot, files_of
from diffalign.data.source import PairSource
from diffalign.data.tables import is_table
from diffalign.data.tar_pairs import TarPairs
from diffalign.errors import DataError
from diffalign.pictures import Reach
from diffalign.places import find, is_hub_id

LINES = (".jsonl", ".ndjson")


def open_pairs(source: str | Path | Sequence[str | Path], **how: Any) -> PairSource:
    """Open preference pairs (winner first), lists of images (best first) or single labelled images.

    Ties are dropped and counted. Example: `open_pairs("assets/tiny-pairs", max_samples=100)`.

    Args:
        source: a parquet file, several, a glob pattern or a folder of them; a JSONL, JSON, CSV or TSV file; a folder
            with w/ and l/, with metadata.jsonl or metadata.csv, or of `save_to_disk`; tar shards; a Hugging Face data
            set id "owner/name"; or a loaded `datasets.Dataset` or `DatasetDict`.
        how: the fields of `Reading`.

    Raises:
        DataError: missing or truncated files, missing columns, unusable rows (the first is named), no usable pair.
    """
    reading = Reading(**how)
    settings = {"max_samples": reading.max_samples, "rejects": Rejects(reading.on_error, reading.error_log)}
    settings["wider"] = () if reading.root is None else (Path(reading.root),)
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
        return FolderPairs(existing(source), **settings)
    if container == "jsonl":
        file = existing(source)
        if not file.is_file():
            raise DataError(f"{file} is no regular file, which a list of pairs must be: it is read more than once.")
        return JsonlPairs(file, reading.of_lines(file), **settings)
    if container == "records":
        return RecordPairs(existing(source), reading, **settings)
    if container == "tars":
        return TarPairs(tar_files(source), reading, **settings)
    if container == "datasets":
        return _open_saved(existing(source), reading, **settings)
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


def _stream_files(files: list[Path], schema: TableSchema, **settings) -> StreamingPairs:
    import datasets

    for file in files:
        with open_parquet(file) as parquet:
            schema.require(parquet.schema_arrow.names, str(file))
    names = [str(file) for file in files]
    stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)

    def describe(memo: Path | None) -> dict:
        return {"files": [[f.name, digest] for f, digest in zip(files, digest_files(files, memo), strict=True)]}

    reach = Reach(files[0].parent, settings["wider"])
    return StreamingPairs(stream, schema, name=str(files[0].parent), describe=describe, reach=reach, **settings)


def _open_saved(place: Path, reading: Reading, **settings: Any) -> PairSource:
    """Open what `datasets` has written: a folder of save_to_disk, or an Arrow file."""
    reach = Reach(place if place.is_dir() else place.parent, settings["wider"])
    loaded = open_saved(place, reading.split, reach)
    return HubPairs(loaded, reading.of_table(loaded.column_names), name=str(place), reach=reach, **settings)


def _container(source: str | Path | Sequence[str | Path], format: str | None) -> str:
    """Return what holds the rows: parquet (the hub's too), jsonl, folders, records, tars or datasets."""
    if format == "folders":
        return format
    if not isinstance(source, str | Path):
        return "tars" if source and all(Path(name).suffix.lower() == ".tar" for name in source) else "parquet"
    path = Path(source)
    if is_saved(path):
        return "datasets"
    if path.is_dir():
        return _of_folder(path, format)
    suffix = path.suffix.lower()
    if suffix in (PARQUET, "") or not (path.is_file() or suffix == ".tar"):
        return "jsonl" if format == "jsonl" or suffix in LINES else "parquet"
    if suffix in ARROW or suffix == ".tar":
        return "datasets" if suffix in ARROW else "tars"
    if is_table(path) and (suffix not in LINES or format == "rankings"):
        return "records"
    if suffix in LINES or format not in (None, "pickapic"):
        return "jsonl"
    known = ", ".join((PARQUET, *LINES, ".json", ".csv", ".tsv", ".tar", *ARROW))
    raise DataError(f"Cannot tell what {path} is: expected {known}. Set format to one of {', '.join(FORMATS)}.")


def _of_folder(folder: Path, format: str | None) -> str:
    if format is None and (folder / "w").is_dir() and (folder / "l").is_dir():
        return "folders"
    if metadata_file(folder) is not None or any(metadata_file(part) for part in folder.iterdir() if part.is_dir()):
        return "records"
    return "tars" if below(folder, ".tar") and not below(folder, PARQUET) else "parquet"


def tar_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the tar shards that a name, a pattern, several names or a folder stand for."""
    if not isinstance(source, str | Path):
        return [existing(name) for name in source]
    if found := matching(source):
        return found
    place = existing(source)
    return below(place, ".tar") if place.is_dir() else [place]
