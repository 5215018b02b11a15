"""Open preferences, whatever holds them."""

import glob
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.fingerprints import digest_files
from diffalign.data.hub import HubPairs, StreamingPairs, hub_revision, load_hub
from diffalign.data.lists import ListColumns, SingleColumns
from diffalign.data.local_files import FolderPairs, JsonlPairs
from diffalign.data.pair_schemas import Columns, PairLines
from diffalign.data.parquet import ParquetPairs, open_parquet
from diffalign.data.schema import TableSchema
from diffalign.data.source import PairSource, Rejects
from diffalign.errors import DataError, suggestion

FORMATS = ("pickapic", "jsonl", "folders", "lists", "singles")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# train-00000-of-00645-b66ac786bf6fb553.parquet, train-00000.parquet or train.parquet: split "train".
SHARD = re.compile(r"-\d+-of-\d+")
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "validation_unique", "test_unique"}
SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z_]\w*?)(?:-\d+(?:-of-\d+)?(?:-\w+)?)?\.parquet")


def open_pairs(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    format: str | None = None,
    image_columns: tuple[str, str] | None = None,
    label_columns: tuple[str, str] = ("label_0", "label_1"),
    caption_column: str = "caption",
    image_caption_columns: tuple[str, str] | None = None,
    list_labels: str = "win_rate",
    max_samples: int | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    error_log: str | Path | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> PairSource:
    """Open preference pairs (winner first), lists of images (best first) or single labelled images.

    Ties are dropped and counted.

    Args:
        source: a parquet file, several, a glob pattern or a folder of them; a JSONL file; a folder with w/ and l/; a
            Hugging Face data set id "owner/name"; or a loaded `datasets.Dataset` or `DatasetDict`.
        split: which split of a hub data set, or of a folder whose parquet files are named after splits.
        format: "pickapic" (parquet, hub), "jsonl" or "folders" for pairs, "lists" or "singles" (parquet, hub, JSONL);
            None tells by what `source` is and by its columns.
        image_columns: default ("jpg_0", "jpg_1"), in JSONL ("image_0", "image_1").
        label_columns: the second may be absent from the data.
        caption_column: JSONL files may also call it "prompt".
        image_caption_columns: captions of the two images of a pair (DCPO), in place of `caption_column`; where a JSON
            line has "chosen" and "rejected", theirs in this order.
        list_labels: "win_rate" turns the scores of a list into win rates, "as_is" takes them, in [0, 1].
        max_samples: use the first so many examples (ties do not count).
        streaming: read a hub data set or parquet files as a stream instead of at random.
        on_error: "raise" at the first unusable row, or "skip": count it, list it and go on.
        error_log: JSONL file for the unusable rows.
        config_name: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.

    Raises:
        DataError: missing or truncated files, missing columns, unusable rows (the first is named), no usable pair.
    """
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples must be at least 1 or None, got {max_samples}.")
    rejects = Rejects(on_error, error_log)
    settings = {"max_samples": max_samples, "rejects": rejects}
    images = tuple(image_columns) if image_columns else None
    captions = tuple(image_caption_columns) if image_caption_columns else None
    meaning = _Meaning(_checked_format(format), images, tuple(label_columns), caption_column, captions, list_labels)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f'The data set has no split "{split}"; it has {", ".join(source)}.')
        source = source[split]
    if hasattr(source, "column_names"):
        return HubPairs(source, meaning.of_table(source.column_names), **settings)
    container = _container(source, format)
    if container == "folders":
        if captions:
            raise DataError("image_caption_columns needs parquet or JSONL: folders hold one caption a pair.")
        return FolderPairs(_existing(source), **settings)
    if container == "jsonl":
        file = _existing(source)
        return JsonlPairs(file, meaning.of_lines(file), **settings)
    if _is_hub_id(source):
        hub = {"split": split, "config_name": config_name, "revision": revision}
        dataset = load_hub(str(source), **hub, streaming=streaming)
        schema = meaning.of_table(dataset.column_names or ())
        if not streaming:
            return HubPairs(dataset, schema, name=str(source), **settings)
        origin = {"dataset": str(source), **hub, "commit": hub_revision(str(source), revision)}
        return StreamingPairs(dataset, schema, name=str(source), describe=lambda memo: origin, **settings)
    files = parquet_files(source, split)
    with open_parquet(files[0]) as parquet:
        schema = meaning.of_table(parquet.schema_arrow.names)
    return _stream_files(files, schema, **settings) if streaming else ParquetPairs(files, schema, **settings)


@dataclass(frozen=True)
class _Meaning:
    """Choose the schema of a data set: as the format says, or by the columns it has."""

    format: str | None
    images: tuple[str, str] | None
    labels: tuple[str, str]
    caption: str
    image_captions: tuple[str, str] | None
    list_labels: str

    def of_table(self, found: Iterable[str]) -> TableSchema:
        return self._schema(Columns, self.images or Columns.images, found)

    def of_lines(self, file: Path) -> TableSchema:
        return self._schema(PairLines, self.images or ("image_0", "image_1"), _first_keys(file))

    def _schema(self, pairs: type[Columns], images: tuple[str, str], found: Iterable[str]) -> TableSchema:
        lists = ListColumns(caption=self.caption, list_labels=self.list_labels)
        schemas = {"lists": lists, "singles": SingleColumns(caption=self.caption)}
        told = self.format or self._told_by(set(found), images)
        if told not in schemas:
            return pairs(caption=self.caption, image_captions=self.image_captions, images=images, labels=self.labels)
        if self.image_captions:
            raise DataError(f'image_caption_columns is for pairs, but these are {told} (format "{told}").')
        return schemas[told]

    @staticmethod
    def _told_by(found: set[str], images: tuple[str, str]) -> str | None:
        if found.issuperset(images) or found.issuperset(("chosen", "rejected")):
            return None
        return "lists" if "images" in found else "singles" if found.issuperset(("image", "label")) else None


def _first_keys(file: Path) -> list[str]:
    """Return the keys of the first line that holds an object; faulty lines are reported by the reader."""
    with open(file, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
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
    files = sorted(f for f in root.rglob("*.parquet") if not any(p.startswith(".") for p in f.relative_to(root).parts))
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


def _split_of(file: Path, root: Path) -> str:
    """Return the split a file belongs to: the folder it is in (train/0000.parquet) or the start of its name."""
    match = SPLIT_FILE.fullmatch(file.name)
    return match["split"] if match else file.parent.name if file.parent != root else "unnamed"


def _checked_format(format: str | None) -> str | None:
    if format is not None and format not in FORMATS:
        raise DataError(f'Unknown format "{format}".{suggestion(format, FORMATS)} Available: {", ".join(FORMATS)}.')
    return format


def _container(source: str | Path | Sequence[str | Path], format: str | None) -> str:
    """Return what holds the rows: "parquet" (the hub's too), "jsonl" or "folders"."""
    if format in ("jsonl", "folders"):
        return format
    if format == "pickapic" or not isinstance(source, str | Path):
        return "parquet"
    path = Path(source)
    if path.suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if format is None and (path / "w").is_dir() and (path / "l").is_dir():
        return "folders"
    if path.is_file() and path.suffix != ".parquet":
        if format is not None:
            return "jsonl"
        raise DataError(
            f"Cannot tell what {path} is: expected .parquet or .jsonl. Set format to one of {', '.join(FORMATS)}."
        )
    return "parquet"


def _is_hub_id(source: str | Path | Sequence[str | Path]) -> bool:
    return (
        isinstance(source, str)
        and HUB_ID.fullmatch(source) is not None
        and not source.startswith(".")
        and not source.endswith((".parquet", ".jsonl"))
        and not Path(source).exists()
    )


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"There is no file or folder {path}.{suggestion(path.name, near)}")
