"""Open preference pairs, whatever holds them."""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.data.fingerprints import digest_files
from diffalign.data.hub import HubPairs, StreamingPairs, hub_revision, load_hub
from diffalign.data.local_files import FolderPairs, JsonlPairs
from diffalign.data.parquet import ParquetPairs, open_parquet
from diffalign.data.schema import Columns
from diffalign.data.source import PairSource, Rejects
from diffalign.errors import DataError, suggestion

FORMATS = ("pickapic", "jsonl", "folders")
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
    max_samples: int | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    error_log: str | Path | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> PairSource:
    """Open preference pairs, winner first, ties dropped and counted.

    Args:
        source: a parquet file, several, a glob pattern or a folder of them; a JSONL file; a folder with w/ and l/; a
            Hugging Face data set id "owner/name"; or a loaded `datasets.Dataset` or `DatasetDict`.
        split: which split of a hub data set, or of a folder whose parquet files are named after splits.
        format: "pickapic" (parquet, hub), "jsonl" or "folders"; None tells by what `source` is.
        image_columns: default ("jpg_0", "jpg_1"), in JSONL ("image_0", "image_1").
        label_columns: the second may be absent from the data.
        caption_column: JSONL files may also call it "prompt".
        max_samples: use the first so many pairs (ties do not count).
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
    columns = Columns(tuple(image_columns or Columns.images), tuple(label_columns), caption_column)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f'The data set has no split "{split}"; it has {", ".join(source)}.')
        source = source[split]
    if hasattr(source, "column_names"):
        return HubPairs(source, columns, **settings)
    format = _checked_format(format) or _detect(source)
    if format == "folders":
        return FolderPairs(_existing(source), **settings)
    if format == "jsonl":
        images = tuple(image_columns or ("image_0", "image_1"))
        return JsonlPairs(_existing(source), Columns(images, columns.labels, caption_column), **settings)
    if _is_hub_id(source):
        hub = {"split": split, "config_name": config_name, "revision": revision}
        dataset = load_hub(str(source), **hub, streaming=streaming)
        if not streaming:
            return HubPairs(dataset, columns, name=str(source), **settings)
        origin = {"dataset": str(source), **hub, "commit": hub_revision(str(source), revision)}
        return StreamingPairs(dataset, columns, name=str(source), describe=lambda memo: origin, **settings)
    files = parquet_files(source, split)
    return _stream_files(files, columns, **settings) if streaming else ParquetPairs(files, columns, **settings)


def _stream_files(files: list[Path], columns: Columns, **settings) -> StreamingPairs:
    import datasets

    for file in files:
        with open_parquet(file) as parquet:
            columns.require(parquet.schema_arrow.names, str(file))
    names = [str(file) for file in files]
    stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)

    def describe(memo: Path | None) -> dict:
        return {"files": [[f.name, digest] for f, digest in zip(files, digest_files(files, memo), strict=True)]}

    return StreamingPairs(stream, columns, name=str(files[0].parent), describe=describe, **settings)


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


def _detect(source: str | Path | Sequence[str | Path]) -> str:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix in (".jsonl", ".ndjson"):
            return "jsonl"
        if (path / "w").is_dir() and (path / "l").is_dir():
            return "folders"
        if path.is_file() and path.suffix != ".parquet":
            raise DataError(
                f"Cannot tell what {path} is: expected .parquet or .jsonl. Set format to one of {', '.join(FORMATS)}."
            )
    return "pickapic"


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
