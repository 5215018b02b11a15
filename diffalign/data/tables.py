"""Tables that people bring, read without guessing: what is written as text stays text.

pandas takes a prompt "null" for nothing, 007 for 7.0 and a column of years for numbers. Here CSV and TSV hold text, and
parquet, Arrow and JSON what they say they hold.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.pairs import Place
from diffalign.errors import DataError
from diffalign.text_files import caption_fault, mapped, numbered_lines, parse_json, read_text, text_stream, well_formed

READ_ERRORS = (OSError, UnicodeDecodeError, pa.ArrowException)


def read_columns(file: Path, numbers: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table: CSV, TSV, JSON lines, JSON (a list of objects, or of texts), parquet, or Arrow.

    Args:
        file: what it is, its ending says, in capitals or not (`KINDS`).
        numbers: columns that are numbers; in CSV too, where all else is text.

    Returns:
        the table; cells of text are str, those that are not there None (in CSV: empty).

    Raises:
        DataError: it cannot be read as what its name says, or a column of numbers holds something else.
    """
    try:
        table = _READERS[file.suffix.lower()](file)
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read {file} ({reason}).") from error
    for name in numbers:
        if name in table:
            table[name] = _numbers(table[name], file)
    return table


def is_table(file: str | Path) -> bool:
    """Tell by its name whether a file is a table."""
    return Path(file).suffix.lower() in _READERS


def captions(table: pd.DataFrame, name: str, file: Path, what: str = "caption") -> list[str]:
    """Return the texts of a column in order, without empty cells; raise DataError for a cell that holds no text."""
    found = []
    for row, value in enumerate(table[name].tolist()):
        fault = caption_fault(value.tolist() if isinstance(value, np.ndarray) else value, what)
        if fault is None:
            found.append(well_formed(value))
        elif not fault[0].startswith("empty"):
            raise DataError(f'{file}, row {row}, column "{name}": {fault[1]}.')
    return found


def json_records(file: Path) -> list[tuple[Place, Any]]:
    """Return the content of JSON lines with their places; raise DataError for a line that is not JSON."""
    records = []
    for number, _, line in numbered_lines(mapped(file)):
        try:
            records.append((Place(str(file), number, "line"), parse_json(line)))
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error}).") from error
    return records


def read_json(file: Path) -> Any:
    """Return the content of a JSON file; raise DataError where it is none."""
    try:
        return parse_json(read_text(file))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}).") from error


def _json_lines(file: Path) -> pd.DataFrame:
    records = json_records(file)
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{file}, line {place.row}: expected a JSON object, got {type(record).__name__}.")
    return _table([record for _, record in records])


def _json(file: Path) -> pd.DataFrame:
    content = read_json(file)
    if isinstance(content, list) and content and all(isinstance(value, str) for value in content):
        return _table([{"prompt": value} for value in content])
    if isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        if len({len(column) for column in content.values()}) == 1:
            return pd.DataFrame(content, dtype=object)
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise DataError(f"{file} must hold a list of objects, or of texts, got {type(content).__name__}.")
    return _table(content)


def _table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a table of any objects: pandas would turn whole numbers into floats where a line lacks one."""
    names = dict.fromkeys(name for record in records for name in record)
    return pd.DataFrame({name: [record.get(name) for record in records] for name in names}, dtype=object)


def _separated(file: Path, **dialect: Any) -> pd.DataFrame:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text_stream(read_text(file)), **dialect)
    names, cells = None, []
    try:
        for row in reader:
            if not row:
                continue
            if names is None:
                names = row
            elif len(row) > len(names):
                raise DataError(
                    f"{file}, line {reader.line_num}: there are {len(row)} cells for {len(names)} columns "
                    f"({', '.join(names)}). Put text that holds a comma into quotation marks."
                )
            else:
                cells.append([*row, *[""] * (len(names) - len(row))])
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}.") from error
    return pd.DataFrame(cells, columns=names, dtype=object)


def open_arrow(file: Path) -> pa.Table:
    """Return an Arrow file, mapped into memory; raise DataError where it is none."""
    try:
        opened = pa.memory_map(str(file))
        try:
            return pa.ipc.open_file(opened).read_all()
        except pa.ArrowInvalid:  # what `datasets` writes: a stream
            opened.seek(0)
            return pa.ipc.open_stream(opened).read_all()
    except READ_ERRORS as error:
        raise DataError(f"{file} is no readable Arrow file ({error}).") from error


def _of_arrow(table: pa.Table) -> pd.DataFrame:
    """Return a table whose whole numbers stay whole where some are missing, and whose categories are texts."""
    return plain_text(table).to_pandas(integer_object_nulls=True)


def plain_text(table: pa.Table) -> pa.Table:
    """Return a table whose columns of categories are columns of what they stand for."""
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return table


def _numbers(column: pd.Series, file: Path) -> pd.Series:
    empty = column.map(lambda value: value is None or (isinstance(value, str) and not value.strip()))
    try:
        return pd.to_numeric(column.mask(empty) if empty.any() else column)
    except (ValueError, TypeError) as error:
        raise DataError(f'{file}: column "{column.name}" should hold numbers ({error}).') from error


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": lambda file: _of_arrow(pq.read_table(file)),
    ".csv": _separated,
    # PartiPrompts as published: prompts hold quotation marks that mean themselves.
    ".tsv": lambda file: _separated(file, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".arrow": lambda file: _of_arrow(open_arrow(file)),
    ".feather": lambda file: _of_arrow(open_arrow(file)),
}
KINDS = tuple(_READERS)
