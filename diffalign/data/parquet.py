"""Preferences in local parquet files, read one row group at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.fingerprints import digest_files, digest_images
from diffalign.data.pair_schemas import Columns
from diffalign.data.pairs import Example, Place, RowError
from diffalign.data.rejects import Rejects
from diffalign.data.schema import Scan, TableSchema, cell_value
from diffalign.data.source import PairSource
from diffalign.errors import DataError
from diffalign.pictures import Reach

# Decompressed row groups kept for the next access, in bytes; at least one is always kept.
KEPT_BYTES = 512 << 20
READ_ERRORS = (pa.ArrowException, OSError)


class ParquetPairs(PairSource):
    """Read examples from parquet files whose images are encoded bytes, datasets' {"bytes", "path"}, or paths.

    Opening reads labels and captions only. An image comes with its row group, of which the latest stay in memory:
    reading in order is fast, jumping about costs a row group each time. Train from a LatentCache on large sets.
    """

    def __init__(
        self,
        files: Sequence[Path],
        schema: TableSchema | None = None,
        *,
        name: str | None = None,
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
    ):
        self.schema, self.wider = schema or Columns(), wider
        super().__init__(rejects, self.schema)
        self.name = name or str(files[0] if len(files) == 1 else files[0].parent)
        self.max_samples = max_samples
        self.files, rows = [], []
        missing, self.has_preference = max_samples, False
        for file, scan in self._scans(files):
            kept, self.images_per_example = scan.finish(self.rejects, str(file), missing, self.images_per_example)
            self.has_preference |= scan.soft
            rows.append(kept)
            self.files.append(file)
            missing = None if missing is None else missing - len(kept)
            if missing == 0:
                break
        self._rows = np.concatenate(rows)
        self._file_of = np.repeat(np.arange(len(rows), dtype=np.int32), [len(kept) for kept in rows])
        self._groups: OrderedDict[tuple[int, int], pa.Table | str] = OrderedDict()
        self._starts: dict[int, np.ndarray] = {}
        self._reaches: dict[Path, Reach] = {}
        self._check_usable()

    def _scans(self, files: Sequence[Path]) -> Iterator[tuple[Path, Scan]]:
        if self.max_samples is not None:  # later files may not be needed at all
            yield from ((file, _scan(file, self.schema)) for file in files)
            return
        with ThreadPoolExecutor(8) as pool:
            yield from zip(files, pool.map(lambda file: _scan(file, self.schema), files), strict=True)

    def __len__(self) -> int:
        return len(self._rows)

    def _fetch(self, index: int) -> Example:
        file, row = int(self._file_of[index]), int(self._rows[index])
        if file not in self._starts:
            with open_parquet(self.files[file]) as parquet:
                sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            self._starts[file] = np.concatenate([[0], np.cumsum(sizes)])
        group = int(np.searchsorted(self._starts[file], row, side="right")) - 1
        table, at = self._group(file, group), row - int(self._starts[file][group])
        place = Place(str(self.files[file]), row)
        if isinstance(table, str):
            raise RowError(place, "unreadable row group", table)
        record = {name: cell_value(table.column(name)[at]) for name in table.column_names}
        return self.schema.read(record, index, place, self._reach(self.files[file].parent))

    def _reach(self, folder: Path) -> Reach:
        if folder not in self._reaches:
            self._reaches[folder] = Reach(folder, self.wider)
        return self._reaches[folder]

    def _group(self, file: int, group: int) -> pa.Table | str:
        """Return a row group, or the error met when reading it."""
        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        try:
            with open_parquet(self.files[file]) as parquet:
                wanted = [f.name for f in parquet.schema_arrow if self._is_wanted(f)]
                table = parquet.read_row_group(group, columns=wanted)
        except READ_ERRORS as error:
            table = f"row group {group} cannot be read ({error})"
        self._groups[key] = table
        while len(self._groups) > 1 and sum(_bytes(kept) for kept in self._groups.values()) > KEPT_BYTES:
            self._groups.popitem(last=False)
        return table

    def _is_wanted(self, column: pa.Field) -> bool:
        return column.name in self.schema.needed or not (
            pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        )

    def captions(self) -> Iterator[str]:
        """Yield the captions of the examples, reading no other column."""
        for number, file in enumerate(self.files):
            with open_parquet(file) as parquet:
                table = parquet.read(columns=list(self.schema.caption_columns))
            wanted = table.take(self._rows[self._file_of == number])
            for column in wanted.columns:
                yield from column.to_pylist()

    def _linked(self, memo: Path | None) -> dict[str, Any]:
        """Describe the image files, if the images are given as paths: their content may change, the table not."""
        with open_parquet(self.files[0]) as parquet:
            types = [field.type for field in parquet.schema_arrow if field.name in self.schema.image_columns]
        if not any(pa.types.is_string(t.value_type if pa.types.is_list(t) else t) for t in types):
            return {}
        rows = [[image.path for image in row.images if image.path and isfile(image.path)] for row in self.iterate()]
        return {"images": digest_images(rows, memo)}

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        digests = digest_files(self.files, memo)
        return {
            **self._linked(memo),
            "format": "parquet",
            "columns": self.schema.identity,
            "max_samples": self.max_samples,
            "pairs": len(self),
            "files": [
                {"name": file.name, "bytes": file.stat().st_size, "blake2b": digest}
                for file, digest in zip(self.files, digests, strict=True)
            ],
        }

    def __getstate__(self) -> dict[str, Any]:
        # Row groups are large and cheap to read again: worker processes start without them.
        return {**self.__dict__, "_groups": OrderedDict()}


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open a parquet file memory-mapped. Raises DataError when it is missing, truncated or no parquet file."""
    try:
        return pq.ParquetFile(file, memory_map=True)
    except READ_ERRORS as error:
        raise DataError(
            f"{file} is no readable parquet file; it may be truncated or still downloading ({error}). Fetch it again."
        ) from error


def _scan(file: Path, schema: TableSchema) -> Scan:
    scan = Scan()
    with open_parquet(file) as parquet:
        names = parquet.schema_arrow.names
        schema.require(names, str(file))
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group, columns=schema.light(names))
            except READ_ERRORS as error:
                raise DataError(
                    f"{file}: row group {group} of {parquet.num_row_groups} cannot be read ({error}). Fetch it again."
                ) from error
            scan.add(table, schema, str(file))
    return scan


def _bytes(table: pa.Table | str) -> int:
    return 0 if isinstance(table, str) else table.nbytes
