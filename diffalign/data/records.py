"""Preferences in a file that is read as a whole: JSON, CSV, TSV, and the metadata of an imagefolder."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.data.lists import ListColumns
from diffalign.data.local_files import FilePairs, check_files
from diffalign.data.pairs import Example, Place, RowError
from diffalign.data.published import LISTED, RANKS
from diffalign.data.reading import Reading
from diffalign.data.rejects import Rejects
from diffalign.data.schema import TIE
from diffalign.data.tables import json_records, read_columns, read_json
from diffalign.errors import DataError
from diffalign.pictures import Reach

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NUMBERS = ("label_0", "label_1", "label", "preference", "rank")  # in CSV they are text
Record = dict[str, Any]


class RecordPairs(FilePairs):
    """Read examples from the objects of a JSON list or the rows of a table; image paths are relative to the file.

    An object is written as a line of JSON (local_files.py), or as published data sets are (published.py). Images may
    also lie in a folder called as the file is, as HPDv2's train/ beside train.json.
    """

    def __init__(
        self,
        place: Path,
        reading: Reading,
        *,
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
    ):
        self.file = place if place.is_file() else _metadata_of(place, reading.split)
        self.lists, self.wider = [self.file], wider
        self._open(str(place), list(_records(self.file)), reading, max_samples, rejects)

    def _open(
        self,
        name: str,
        records: list[tuple[Place, Any]],
        reading: Reading,
        max_samples: int | None,
        rejects: Rejects | None,
    ) -> None:
        """Judge every record and keep the usable ones."""
        if not records:
            raise DataError(f"{name} is empty.")
        records = _grouped(records)
        found = next((record for _, record in records if isinstance(record, dict)), {})
        self.schema = reading.of_records(found)
        rows: Iterator[tuple[Place, Any]] = iter(records)
        if reading.format == "rankings":
            if not isinstance(self.schema, ListColumns):
                raise DataError(f"{name} holds no ranked lists; its columns are {', '.join(found)}.")
            rows = _pairs_of(records, self.schema)
            self.schema = replace(reading, format=None).of_records(("chosen", "rejected", self.schema.caption))
        super().__init__(rejects, self.schema)
        self.name, self._kept, self._reach = name, [], self._find_reach(found)
        for _ in self._admit((self._try(place, record) for place, record in rows), max_samples):
            self._kept.append(self._tried)
        self._check_usable()

    def _try(self, place: Place, record: Any) -> Example | int | RowError:
        self._tried = place, record
        if isinstance(record, RowError | int):
            return record
        try:
            row = self._example(place, self.placeholders(record), self.counts.pairs)
            if isinstance(row, Example):
                check_files(row)
            return self.fitting(row, place)
        except RowError as error:
            return error

    def _example(self, place: Place, record: Any, index: int) -> Example | int:
        if not isinstance(record, dict):
            raise RowError(place, "malformed line", f"expected an object, got {type(record).__name__}")
        return self.schema.of_line(record, place).read(record, index, place, self._reach)

    def placeholders(self, record: Any) -> Any:
        """Return a record as it is judged before its images are read."""
        return record

    def loaded(self, record: Record, place: Place) -> Record:
        """Return a record with its images."""
        return record

    def _find_reach(self, record: Mapping[str, Any]) -> Reach:
        """Return which files a record may name; names start at the first folder in which those of a record are."""
        texts = [x for value in record.values() for x in (value if isinstance(value, list) else [value])]
        names = [text for text in texts if isinstance(text, str) and "\n" not in text and len(text) < 500]
        parent = self.file.parent
        beside = (parent / self.file.stem, parent / "images", parent / "images" / self.file.stem)
        data = Reach(parent, self.wider)
        reaches = [data, *(Reach(root, (parent, *self.wider)) for root in beside if data.holds(root))]
        return next((reach for reach in reaches if any(map(reach.finds, names))), data)

    def __len__(self) -> int:
        return len(self._kept)

    def _fetch(self, index: int) -> Example:
        place, record = self._kept[index]
        return self._example(place, self.loaded(record, place), index)

    def _paths(self, index: int) -> tuple[Path, ...]:
        return tuple(image.path for image in self._fetch(index).images)

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        return {**super()._describe(memo), "columns": self.schema.identity}


def metadata_file(folder: Path) -> Path | None:
    """Return the file that says what the pictures of an imagefolder are, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _metadata_of(folder: Path, split: str) -> Path:
    file = metadata_file(folder) or metadata_file(folder / split)
    if file is None:
        raise DataError(f'{folder} has no split "{split}": there is no {split}/{METADATA[0]}.')
    return file


def _records(file: Path) -> Iterator[tuple[Place, Any]]:
    """Yield the records of a file with their places, file names of an imagefolder under their columns' names."""
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        found = iter(json_records(file))
    elif suffix == ".json":
        content = read_json(file)
        if not isinstance(content, list):
            raise DataError(f"{file} must hold a list of objects, got {type(content).__name__}.")
        found = ((Place(str(file), row, "entry"), record) for row, record in enumerate(content))
    else:
        table = read_columns(file)
        rows = (dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False, name=None))
        found = ((Place(str(file), row), _with_numbers(record)) for row, record in enumerate(rows))
    for place, record in found:
        yield place, _named(record) if isinstance(record, dict) and file.name in METADATA else record


def _with_numbers(record: Record) -> Record:
    """Return a row of a CSV with its labels as numbers; an empty one is none."""
    return {name: _number(value) if name in NUMBERS else value for name, value in record.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError:
        return value  # the schema says what is wrong with it


def _named(record: Record) -> Record:
    """Return a row of an imagefolder as `datasets` names its columns: chosen_file_name becomes chosen."""
    renamed = {}
    for name, value in record.items():
        for ending, alone in (("file_names", "images"), ("file_name", "image")):
            if name == ending or name.endswith(f"_{ending}"):
                name = name.removesuffix(ending).removesuffix("_") or alone
        renamed[name] = value
    return renamed


def _grouped(records: list[tuple[Place, Any]]) -> list[tuple[Place, Any]]:
    """Return lists of images where every record is one image with its rank and prompt_id, as in ImageRewardDB."""
    first = next((record for _, record in records if isinstance(record, dict)), {})
    image = next((name for name in LISTED if isinstance(first.get(name), str)), None)
    rank = next((name for name in RANKS if isinstance(first.get(name), int | float)), None)
    if image is None or rank is None or "prompt_id" not in first:
        return records
    groups: dict[Any, tuple[Place, Record]] = {}
    others: list[tuple[Place, Any]] = []
    for place, record in records:
        if not isinstance(record, dict) or not {"prompt_id", image, rank} <= record.keys():
            others.append((place, RowError(place, "missing column", f'expected "prompt_id", "{image}" and "{rank}"')))
            continue
        key = str(record["prompt_id"])
        _, group = groups.setdefault(key, (place, {**record, image: [], rank: []}))
        group[image].append(record[image])
        group[rank].append(record[rank])
    return [*groups.values(), *others]


def _pairs_of(records: list[tuple[Place, Any]], schema: ListColumns) -> Iterator[tuple[Place, Any]]:
    """Yield a pair for every two images of a list of which one is ranked higher; what is no list as it is judged."""
    for place, record in records:
        try:
            if not isinstance(record, dict):
                raise RowError(place, "malformed line", f"expected an object, got {type(record).__name__}")
            fitting = schema.of_line(record, place)
            labels = fitting.labels(record, place)
            images = record.get(schema.images)
            if not isinstance(labels, int) and (not isinstance(images, list) or len(images) != len(labels)):
                raise RowError(
                    place, "list length", f"there are {len(labels)} ranks, but the images are {images!r:.80}"
                )
        except RowError as error:
            yield place, error
            continue
        if isinstance(labels, int):
            yield place, labels
            continue
        caption = record[fitting.caption]
        for i, better in enumerate(labels):
            for j, worse in enumerate(labels):
                if better > worse:
                    yield place, {schema.caption: caption, "chosen": images[i], "rejected": images[j]}
                elif better == worse and i < j:
                    yield place, TIE
