"""Tables for the terminal, and files of tables."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.table import Table
from rich.text import Text

from diffalign.errors import DataError, UserError
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.scoring import format_score

ROWS_PER_GROUP = 64

_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
}


def check_suffix(out: Path) -> None:
    """Raise UserError unless a table can be written to `out`."""
    if out.suffix.lower() not in _WRITERS:
        raise UserError(f'Cannot write a table as "{out}": expected a name ending in {", ".join(_WRITERS)}.')
    if out.is_dir():
        raise UserError(f'"{out}" is a folder. Give the name of a file, e.g. {out / "scores.parquet"}.')


def write(table: pd.DataFrame, out: Path) -> None:
    """Write a table in the format that the suffix of `out` names, whole or not at all."""
    check_suffix(out)
    with atomic_write(out) as temporary:
        _WRITERS[out.suffix.lower()](table, temporary)


def write_rows(rows: Iterable[dict[str, Any]], out: Path, nothing: str) -> int:
    """Write parquet rows a group at a time, the file whole or not at all; return their number.

    Raises:
        DataError: with the words of `nothing`, if there is no row.
    """
    count, writer = 0, None
    with atomic_write(out) as temporary:
        try:
            for batch in batched(rows, ROWS_PER_GROUP):
                table = pa.Table.from_pylist(batch, schema=writer and writer.schema)
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
                count += len(batch)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise DataError(nothing)
    return count


def batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists of `size`, the last maybe shorter."""
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


def plain(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; the first column is text, the others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def means(scores: pd.DataFrame) -> Table:
    """Return mean and standard error by model (down) and scorer (across)."""
    judges, models = list(scores["scorer"].unique()), list(scores["model"].unique())
    table = plain("model", "pictures", *judges, title="Mean score +- standard error")
    groups = scores.groupby(["model", "scorer"], sort=False)["score"]
    average, error, count = groups.mean(), groups.sem(), groups.count()
    largest = {judge: scores.loc[scores["scorer"] == judge, "score"].abs().max() for judge in judges}
    for model in models:
        cells = [str(count[model, judges[0]])]
        for judge in judges:
            text = format_score(average[model, judge], largest[judge])
            if count[model, judge] > 1:
                text += f" +- {format_score(error[model, judge], largest[judge] / 10)}"
            cells.append(text)
        table.add_row(Text(str(model)), *cells)
    return table
