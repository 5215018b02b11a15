"""Tables that users bring, with named columns."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from diffalign.data import tables
from diffalign.data.fingerprints import digest_files
from diffalign.errors import DataError, suggestion


def read_table(path: str | Path, columns: Sequence[str], what: str, numbers: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table that has `columns`; `what` says in a message what kind of file is expected.

    numbers: the columns that hold numbers.

    Raises:
        DataError: missing, unreadable, of another type, empty or without the columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Expected {what}.")
    if not tables.is_table(path):
        raise DataError(f"Cannot read {path}: expected {what}, ending in {', '.join(tables.KINDS)}.")
    try:
        table = tables.read_columns(path, numbers)
    except DataError as error:
        raise DataError(f"Cannot read {path}: {error} Expected {what}.") from error
    found = [str(name) for name in table.columns]
    if missing := [name for name in columns if name not in found]:
        words = ", ".join(f'"{name}"' for name in missing)
        hint = suggestion(missing[0], found)
        raise DataError(f"{path} lacks the column(s) {words}.{hint} It has: {', '.join(found)}. Expected {what}.")
    if table.empty:
        raise DataError(f"{path} has no rows. Expected {what}.")
    return table


def weights_identity(path_or_id: str, memo: Path | None = None) -> str:
    """Return what the weights at a path are: a hash of its files; of a hub id the id itself."""
    path = Path(path_or_id)
    if not path.exists():
        return path_or_id
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    names = [str(file.relative_to(path)) for file in files]
    return json.dumps(dict(zip(names, digest_files(files, memo), strict=True)))
