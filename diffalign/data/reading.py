"""How preferences are read: what their columns mean, by name or as asked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.data.lists import ListColumns, SingleColumns
from diffalign.data.pair_schemas import Columns, PairLines
from diffalign.data.published import published_schema
from diffalign.data.schema import TableSchema
from diffalign.errors import DataError, suggestion
from diffalign.text_files import mapped, numbered_lines, parse_json

FORMATS = ("pickapic", "jsonl", "folders", "lists", "singles", "rankings")


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
    root: str | Path | None = None  # images may be files in this folder too, and not only beside the data

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise DataError(f"max_samples must be at least 1 or None, got {self.max_samples}.")
        if self.format is not None and self.format not in FORMATS:
            hint = suggestion(self.format, FORMATS)
            raise DataError(f'Unknown format "{self.format}".{hint} Available: {", ".join(FORMATS)}.')
        if self.root is not None and not Path(self.root).is_dir():
            raise DataError(f"root must be a folder that holds the images, got {self.root}.")

    def of_table(self, found: Iterable[str]) -> TableSchema:
        """Return the schema of parquet or of the hub: as the format says, or by the columns there are."""
        if self.format == "rankings":
            raise DataError(
                'Format "rankings" is for JSON, JSON lines and tar shards. Read a table of lists with format "lists", '
                "or write it as JSON lines."
            )
        return self._schema(Columns, self.image_columns or Columns.images, found)

    def of_lines(self, file: Path) -> TableSchema:
        """Return the schema of a JSONL file."""
        return self.of_records(_first_keys(file))

    def of_records(self, found: Iterable[str]) -> TableSchema:
        """Return the schema of JSON objects, rows of CSV and members of tar shards."""
        found = set(found)
        usual = Columns.images if found.issuperset(Columns.images) else ("image_0", "image_1")
        return self._schema(PairLines, self.image_columns or usual, found)

    def _schema(self, pairs: type[Columns], images: Sequence[str], found: Iterable[str]) -> TableSchema:
        found = set(found)
        caption = self._caption(found)
        if published := self._published(found, caption, pairs is PairLines):
            return published
        lists = ListColumns(caption=caption, list_labels=self.list_labels)
        schemas = {"lists": lists, "singles": SingleColumns(caption=caption)}
        told = self.format or self._told_by(found, images)
        if told == "rankings" and "images" in found:
            told = "lists"
        captions = tuple(self.image_caption_columns) if self.image_caption_columns else None
        if told not in schemas:
            columns = {"images": tuple(images), "labels": tuple(self.label_columns)}
            return _with_noises(pairs(caption=caption, image_captions=captions, **columns), found)
        if captions:
            raise DataError(f'image_caption_columns is for pairs, but these are {told} (format "{told}").')
        return _with_noises(schemas[told], found)

    def _published(self, found: set[str], caption: str, lines: bool) -> TableSchema | None:
        """Return the schema of a published data set; JSON lines that name winners may differ from line to line."""
        own = found.issuperset(("chosen", "rejected"))
        if self.format == "singles" or self.image_columns or (own and (lines or self.format == "lists")):
            return None
        schema = published_schema(found, caption, self.list_labels, lists=self.format in ("lists", "rankings"))
        if own and schema is not None:
            captions = tuple(self.image_caption_columns) if self.image_caption_columns else None
            return _with_noises(replace(schema, image_captions=captions), found)
        return schema

    def _caption(self, found: set[str]) -> str:
        """Return the column of the caption: as asked, or what it is called where there is no "caption"."""
        if self.caption_column in found or self.caption_column != "caption":
            return self.caption_column
        return next((name for name in ("prompt", "original_prompt") if name in found), self.caption_column)

    @staticmethod
    def _told_by(found: set[str], images: Sequence[str]) -> str | None:
        if found.issuperset(images) or found.issuperset(("chosen", "rejected")):
            return None
        return "lists" if "images" in found else "singles" if found.issuperset(("image", "label")) else None


def _with_noises(schema: TableSchema, found: set[str]) -> TableSchema:
    """Return the schema that also reads what images were drawn from, where the columns say it."""
    names = next((names for names in schema.noise_names if found.issuperset(names)), None)
    return schema if names is None else replace(schema, noises=names)


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
