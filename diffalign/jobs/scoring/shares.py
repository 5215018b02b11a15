"""What several processes divide among them, and what each leaves for the one that puts the results together."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from diffalign.errors import UserError
from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs.scoring.decode import KEY
from diffalign.jobs.scoring.items import Source
from diffalign.jobs.scoring.store import Known
from diffalign.text_files import shown


@dataclass(frozen=True)
class Share:
    """Say which part of the work is this process's: part `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, shard: str | None) -> Self:
        """Return the share of this process: `shard` "2/4" among machines, divided by the ranks of its launcher.

        Raises:
            UserError: `shard` is not i/n with 1 <= i <= n.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if shard is None:
            return cls(rank, world)
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f'--shard must be i/n with i from 1 to n, e.g. 1/4 to 4/4 on four machines; got "{shard}".')
        return cls((int(match[1]) - 1) * world + rank, int(match[2]) * world)

    def bounds(self, source: Source) -> tuple[int, int]:
        """Return the positions start <= p < stop of this share: a stretch, so that few row groups are read twice."""
        groups = len(source) // source.group
        cuts = [groups * part // self.count * source.group for part in (self.index, self.index + 1)]
        return cuts[0], cuts[1]


@dataclass(frozen=True)
class Index:
    """Say what was found at positions start, start + 1, ...: which picture and prompt, or what is wrong."""

    start: int
    keys: np.ndarray  # [n] KEY
    names: list[str]
    captions: list[str]
    faults: list[str]  # empty where there is none

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the indices of neighbouring shares as one."""
        lists = ([x for part in parts for x in getattr(part, name)] for name in ("names", "captions", "faults"))
        return cls(parts[0].start, np.concatenate([part.keys for part in parts]), *lists)

    @property
    def whole(self) -> np.ndarray:
        """Return which pictures have no fault, bool [n]."""
        return np.array([not fault for fault in self.faults], dtype=bool)

    def images(self) -> list[str]:
        """Return the hash of each picture in hexadecimal."""
        raw = np.ascontiguousarray(self.keys).view(np.uint8).reshape(-1, 32)[:, :16].tobytes()
        return [raw[i : i + 16].hex() for i in range(0, len(raw), 16)]

    def complete(self, known: Known) -> bool:
        """Tell whether every whole picture has a score."""
        return bool(np.isfinite(known.of(self.keys)[self.whole]).all())


def request_id(source: Source, count: int) -> str:
    """Return a name for what is scored, the same in all `count` processes.

    Of several it depends on the content: what another process left of earlier pictures is not taken for its part.
    """
    content = source.content() if count > 1 else ""
    return hashlib.blake2b(f"{shown(source.name)}\0{len(source)}\0{content}".encode(), digest_size=8).hexdigest()


def write_index(folder: Path, request: str, share: Share, index: Index) -> None:
    """Leave the index of a finished share."""
    raw = np.ascontiguousarray(index.keys).view(np.uint8).reshape(-1, 32)
    columns = {"key": [row.tobytes() for row in raw], "name": index.names, "caption": index.captions}
    with atomic_write(_place(folder, request, share)) as temporary:
        pd.DataFrame({**columns, "fault": list(map(shown, index.faults))}).to_parquet(temporary)


def read_indices(folder: Path, request: str, count: int, source: Source) -> Iterator[Index]:
    """Yield the indices of the shares that are finished."""
    for part in range(count):
        share = Share(part, count)
        file = _place(folder, request, share)
        if file.is_file():
            table = pd.read_parquet(file)
            raw = np.frombuffer(b"".join(table["key"]), dtype=KEY)
            columns = (table[name].tolist() for name in ("name", "caption", "fault"))
            yield Index(share.bounds(source)[0], raw, *columns)


def _place(folder: Path, request: str, share: Share) -> Path:
    return folder / f"index-{request}-{share.index + 1}of{share.count}.parquet"
