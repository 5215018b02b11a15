"""Write chosen pairs as parquet: rows of parquet files as they are, pairs of other sources in Pick-a-Pic's columns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data import PairRow, PairSource, RowError
from diffalign.errors import DataError

PICKAPIC = pa.schema(
    {
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "caption": pa.string(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "best_image_uid": pa.string(),
        "are_different": pa.bool_(),
        "has_label": pa.bool_(),
    }
)
ROWS = 256  # of a row group


def write_pairs(
    source: PairSource,
    pairs: pd.DataFrame,
    chosen: Any,
    path: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write some pairs of a source in its order.

    Args:
        source: where they come from.
        pairs: the table of `Components`, all of it.
        chosen: indices into it, or a mask [N].
        path: the parquet file.
        advance: told how many pairs are written.
    """
    part = pairs.iloc[np.sort(np.arange(len(pairs))[chosen])]
    if is_one_row_a_pair(pairs):
        _copy_rows(part, path, advance)
    else:
        _write_pickapic(source, part, path, advance)


def is_one_row_a_pair(pairs: pd.DataFrame) -> bool:
    """Tell whether every pair is one row of a local parquet file and shares it with no other pair."""
    files = pairs["file"].unique()
    parquet = all(str(file).endswith(".parquet") and Path(file).is_file() for file in files)
    return parquet and not pairs.duplicated(["file", "row"]).any()


def _copy_rows(part: pd.DataFrame, path: Path, advance: Callable[[int], None]) -> None:
    """Copy rows with all their columns; files of one data set have one schema."""
    files = [str(file) for file in dict.fromkeys(part["file"])]
    schema = pq.read_schema(files[0])
    with pq.ParquetWriter(path, schema) as writer:
        for file in files:
            rows = np.sort(part.loc[part["file"] == file, "row"].to_numpy())
            with pq.ParquetFile(file, memory_map=True) as parquet:
                start = 0
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    wanted = rows[(rows >= start) & (rows < stop)] - start
                    if len(wanted):
                        writer.write_table(_fitting(parquet.read_row_group(group).take(wanted), schema, file, files[0]))
                        advance(len(wanted))
                    start = stop


def _fitting(table: pa.Table, schema: pa.Schema, file: str, first: str) -> pa.Table:
    if table.schema.names != schema.names or table.schema.types != schema.types:
        raise DataError(f"{file} has other columns than {first}. Filter them one by one, or bring them to one schema.")
    return table.cast(schema)  # differences in metadata only


def _write_pickapic(source: PairSource, part: pd.DataFrame, path: Path, advance: Callable[[int], None]) -> None:
    schema = schema_of(source)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(part), ROWS):
            rows = source.rows(part["index"].iloc[start : start + ROWS].tolist())
            records = [record for row in rows if (record := whole(source, row))]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
            advance(len(rows))


def schema_of(source: PairSource) -> pa.Schema:
    """Return the columns of `whole`: Pick-a-Pic's, and what the images were drawn from where the source says it."""
    if not source.has_noises:
        return PICKAPIC
    return pa.schema([*PICKAPIC, *(pa.field(f"noise_{side}", pa.string()) for side in (0, 1))])


def whole(source: PairSource, row: PairRow) -> dict[str, Any] | None:
    """Return the record of a pair whose images are pictures: no other file's bytes are copied. Image 0 won."""
    try:
        return _record(row)
    except RowError as error:
        source.rejects.add(error)
        return None


def _record(row: PairRow) -> dict[str, Any]:
    """Return a pair as a row of Pick-a-Pic: image 0 won."""
    preference = 1.0 if row.preference is None else row.preference
    return {
        "jpg_0": row.chosen.decodable,
        "jpg_1": row.rejected.decodable,
        "label_0": preference,
        "label_1": 1.0 - preference,
        "caption": row.prompt,
        "image_0_uid": row.chosen.identity,
        "image_1_uid": row.rejected.identity,
        "best_image_uid": row.chosen.identity,
        "are_different": True,
        "has_label": True,
        **{f"noise_{side}": noise for side, noise in enumerate(row.noises or ())},
    }
