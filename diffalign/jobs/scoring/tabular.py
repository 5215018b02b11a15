"""Tables of pictures with captions: parquet and Arrow files, and JSON lines with paths."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from diffalign.data import RowError
from diffalign.data.pairs import Place
from diffalign.data.parquet import READ_ERRORS, open_parquet
from diffalign.data.schema import cell_value, image_ref
from diffalign.data.tables import open_arrow
from diffalign.errors import DataError, suggestion
from diffalign.jobs.drawing.captions import CAPTIONS
from diffalign.jobs.scoring.items import Item, PictureSource
from diffalign.jobs.scoring.tars import NO_CAPTION
from diffalign.pictures import Reach
from diffalign.text_files import caption_fault, mapped, numbered_lines, parse_json, shown, well_formed

IMAGES = ("image", "jpg", "png", "webp", "img", "picture", "file_name", "file", "path", "image_path")
ROWS_AT_ONCE = 32  # of encoded pictures in memory, besides those on their way to the workers


def column(asked: str | None, usual: tuple[str, ...], found: list[str], file: Path, option: str) -> str:
    """Return the column asked for, or the first usual one; raise DataError where there is none."""
    if asked is not None and asked not in found:
        raise DataError(f'{file} has no column "{asked}".{suggestion(asked, found)} It has: {", ".join(found)}.')
    name = asked or next((name for name in usual if name in found), None)
    if name is None:
        hint = " These look like pairs: give them to --pairs." if {"jpg_0", "image_0", "chosen"} & set(found) else ""
        raise DataError(
            f"{file} has none of the columns {', '.join(usual)}: name it with {option}.{hint} "
            f"It has: {', '.join(found)}."
        )
    return name


def located(value: Any, place: Place, reach: Reach) -> dict[str, Any]:
    """Return `data` of an Item for what a cell holds, or its `fault`."""
    try:
        ref = image_ref(value, place, reach)
    except RowError as error:
        return {"fault": error.detail}
    return {"data": ref.data if ref.data is not None else str(ref.path)}


class _Rows(PictureSource):
    """Share what both kinds of tables have: a file, and a prompt a row."""

    unit = "row"

    def __init__(self, file: Path, root: Path | None = None):
        self.file, self.name = file, str(file)
        self.reach = Reach.of(file.parent, root)
        self.prompts: list[str | None] = []
        self.faults: dict[int, str] = {}  # by row, why its caption is none
        self.numbers: Sequence[int] = ()  # of the rows in the file
        self.with_prompts = True

    def __len__(self) -> int:
        return len(self.prompts)

    def table(self) -> pd.DataFrame:
        """Return file ("table:row"), prompt and model (the table) of every row."""
        files = [shown(f"{self.name}:{number}") for number in self.numbers]
        return pd.DataFrame({"file": files, "prompt": [p or "" for p in self.prompts], "model": shown(self.name)})

    def add_caption(self, value: Any) -> None:
        """Take what the next row holds as its caption."""
        fault = caption_fault(value)
        if fault is not None:
            self.faults[len(self.prompts)] = NO_CAPTION if fault[0].startswith("empty") else fault[1]
        self.prompts.append(None if fault else well_formed(value))

    def item(self, row: int, value: Any) -> Item:
        """Return the picture in a cell."""
        found = located(value, Place(self.name, self.numbers[row], self.unit), self.reach)
        if self.with_prompts and row in self.faults:
            found = {"fault": self.faults[row]}
        return Item(row, shown(f"{self.name}:{self.numbers[row]}"), self.prompts[row] or "", **found)


class ParquetRows(_Rows):
    """Offer the rows of a parquet file; images are bytes, datasets' {"bytes", "path"}, or paths.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """

    def __init__(
        self,
        file: Path,
        *,
        image: str | None = None,
        caption: str | None = None,
        with_prompts: bool = True,
        root: Path | None = None,
    ):
        super().__init__(file, root)
        self.with_prompts = with_prompts
        with open_parquet(file) as parquet:
            found = parquet.schema_arrow.names
            self.image = column(image, IMAGES, found, file, "--image-column")
            counts = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        self.groups = pd.Series([0, *counts]).cumsum().tolist()  # first row of each, and the end
        self.numbers = range(self.groups[-1])
        if not with_prompts:
            self.prompts = [None] * len(self.numbers)
            return
        name = column(caption, CAPTIONS, found, file, "--caption-column")
        try:
            cells = pq.read_table(file, columns=[name]).column(name)
        except READ_ERRORS as error:
            raise DataError(f'{file}: column "{name}" cannot be read ({error}). Fetch it again.') from error
        for cell in cells:
            self.add_caption(cell_value(cell))

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield rows; a row group that cannot be read is a fault of each of its rows."""
        for group, first in enumerate(self.groups[:-1]):
            if first < stop and self.groups[group + 1] > start:
                for item in self._of_group(group, first):
                    if start <= item.position < stop:
                        yield item

    def _of_group(self, group: int, first: int) -> Iterator[Item]:
        row = first
        try:
            with open_parquet(self.file) as parquet:
                for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.image]):
                    for value in batch.column(0):
                        yield self.item(row, value.as_py())
                        row += 1
        except READ_ERRORS as error:
            for broken in range(row, self.groups[group + 1]):
                fault = f"row group {group} cannot be read ({error})"
                yield Item(broken, shown(f"{self.name}:{broken}"), self.prompts[broken] or "", None, fault)


class ArrowRows(_Rows):
    """Offer the rows of an Arrow file, as `datasets` saves them; images are as in parquet.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """

    def __init__(
        self,
        file: Path,
        *,
        image: str | None = None,
        caption: str | None = None,
        with_prompts: bool = True,
        root: Path | None = None,
    ):
        super().__init__(file, root)
        self.with_prompts = with_prompts
        table = open_arrow(file)
        self.images = table.column(column(image, IMAGES, table.column_names, file, "--image-column"))
        self.numbers = range(len(table))
        if not with_prompts:
            self.prompts = [None] * len(table)
            return
        for cell in table.column(column(caption, CAPTIONS, table.column_names, file, "--caption-column")):
            self.add_caption(cell_value(cell))

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield these rows."""
        for row, cell in enumerate(self.images.slice(start, stop - start), start):
            yield self.item(row, cell.as_py())


class JsonRows(_Rows):
    """Offer JSON lines {"image": path, "caption": text}; paths start at the file's folder. Blank lines are skipped.

    Raises:
        DataError: there is no line.
    """

    unit = "line"

    def __init__(
        self,
        file: Path,
        *,
        image: str | None = None,
        caption: str | None = None,
        with_prompts: bool = True,
        root: Path | None = None,
    ):
        super().__init__(file, root)
        self.with_prompts = with_prompts
        self.values: list[Any] = []
        self.numbers = []
        names, captions = (image,) if image else IMAGES, (caption,) if caption else CAPTIONS
        self.broken: dict[int, str] = {}  # by row, why its line is none
        for number, _, line in numbered_lines(mapped(file)):
            record = _parsed(line)
            if isinstance(record, str):
                self.broken[len(self.values)] = record
                record = {}
            self.numbers.append(number)
            self.values.append(next((record[name] for name in names if name in record), None))
            self.add_caption(next((record[name] for name in captions if name in record), None))
        if not self.values:
            raise DataError(f"{file} is empty.")
        if all(value is None for value in self.values):
            raise DataError(f"No line of {file} is a JSON object with one of {', '.join(names)}.")

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the pictures of these lines."""
        for row in range(start, stop):
            item = self.item(row, self.values[row])
            yield item._replace(fault=self.broken[row]) if row in self.broken else item


def _parsed(line: bytes) -> dict[str, Any] | str:
    """Return the object in a line, or what is wrong with it."""
    try:
        record = parse_json(line)
    except ValueError as error:
        return f"not valid JSON ({error})"
    return record if isinstance(record, dict) else f"expected a JSON object, got {type(record).__name__}"
