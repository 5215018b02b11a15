"""Scores that are known: parquet parts in a folder beside the output, and journals of runs that were killed.

A score belongs to a picture (hash of its bytes), a prompt (hash), a scorer, its weights and its preprocessing; where a
picture lies does not matter. Every batch is appended to a journal, an Arrow stream, before the next one is scored: what
a killed process had finished is there. A full journal becomes a part, which appears under its name when it is whole.
"""

import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs.scoring.decode import KEY

PART_ROWS = 100_000
SCHEMA = pa.schema(
    [
        ("image", pa.binary(16)),
        ("prompt", pa.binary(16)),
        ("scorer", pa.string()),
        ("weights", pa.string()),
        ("preprocessing", pa.string()),
        ("score", pa.float32()),
    ]
)
TORN = (pa.ArrowException, OSError, EOFError)  # what the end of a journal looks like when its writer was killed


class Identity(NamedTuple):
    """Say whose scores they are."""

    scorer: str
    weights: str  # hash of the weights and of what else shapes a score
    preprocessing: str


class Known(NamedTuple):
    """Hold the scores of one scorer."""

    keys: np.ndarray  # [m] KEY, sorted, each once
    scores: np.ndarray  # [m] float32

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Return the scores [n] float64 of keys [n]; NaN where there is none."""
        values = np.full(len(keys), np.nan)
        if len(self.keys):
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            hit = self.keys[places] == keys
            values[hit] = self.scores[places[hit]]
        return values


class Store:
    """Keep scores in a folder; several processes may add to it at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._journal: Path | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._rows = 0

    def known(self, identities: Sequence[Identity]) -> list[Known]:
        """Return what is known of each scorer; a torn journal gives all its whole batches."""
        tables = [pq.read_table(file) for file in sorted(self.folder.glob("part-*.parquet"))]
        tables += [read_journal(file) for file in sorted(self.folder.glob("journal-*.arrows"))]
        whole = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        owners = [whole.column(name).to_pandas() for name in Identity._fields]
        found = []
        for identity in identities:
            mine = np.ones(len(whole), dtype=bool)
            for owner, value in zip(owners, identity, strict=True):
                mine &= (owner == value).to_numpy()
            part = whole.filter(pa.array(mine))
            keys, first = np.unique(_keys(part), return_index=True)
            found.append(Known(keys, part.column("score").to_numpy()[first]))
        return found

    def add(self, identity: Identity, keys: np.ndarray, scores: np.ndarray) -> None:
        """Append scores [n] of keys [n]; they survive the death of this process from here on."""
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = self.folder / f"journal-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.arrows"
            # unbuffered: what Arrow writes is with the system at once
            self._sink = open(self._journal, "wb", buffering=0)
            self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        raw = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 32)
        names = [pa.repeat(value, len(keys)) for value in identity]
        columns = [_binary(raw[:, :16]), _binary(raw[:, 16:]), *names, pa.array(scores, pa.float32())]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._rows += len(keys)
        if self._rows >= PART_ROWS:
            self.seal()

    def seal(self) -> None:
        """Turn the journal of this process into a parquet part."""
        if self._writer is None:
            return
        self._writer.close()
        self._sink.close()
        with atomic_write(self.folder / f"part-{uuid.uuid4().hex}.parquet") as temporary:
            pq.write_table(read_journal(self._journal), temporary)
        self._journal.unlink()  # a kill before this leaves the rows twice, and `known` takes each once
        self._writer, self._rows = None, 0


def read_journal(file: Path) -> pa.Table:
    """Return the whole batches of a journal; its writer may have been killed in the middle of one."""
    batches = []
    try:
        with pa.ipc.open_stream(file.read_bytes()) as reader:
            for batch in reader:
                batches.append(batch)
    except TORN:
        pass
    return pa.Table.from_batches(batches, schema=SCHEMA)


def _binary(raw: np.ndarray) -> pa.Array:
    """Return bytes [n, 16] as Arrow's fixed-size binary."""
    return pa.Array.from_buffers(pa.binary(16), len(raw), [None, pa.py_buffer(np.ascontiguousarray(raw).tobytes())])


def _keys(table: pa.Table) -> np.ndarray:
    """Return the keys [n] of a table."""
    halves = []
    for name in ("image", "prompt"):
        column = table.column(name).combine_chunks()
        raw = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.empty(0, np.uint8)
        halves.append(raw[column.offset * 16 : (column.offset + len(column)) * 16].reshape(-1, 16))
    return np.ascontiguousarray(np.hstack(halves)).view(KEY).reshape(-1)
