"""Pictures to score, by position: where their bytes are, and the prompt. Nothing here is decoded."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from diffalign.data.tars import Span


class Item(NamedTuple):
    """Hold one picture to score. It travels to a worker process, so it is small unless it carries bytes."""

    position: int  # in its source
    name: str  # what to call it in messages and tables
    prompt: str
    data: bytes | str | Span | None = None  # encoded, the path of a file, or a stretch of one
    fault: str | None = None  # why it cannot be scored, where the source knows it already
    caption: str | None = None  # the picture's own caption, where it is not what it is scored for


class Source(ABC):
    """Offer pictures by position, so that processes can share them and a run can go on."""

    name: str
    group: int = 1  # so many neighbours belong together: 2 of a pair

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the pictures at positions start <= p < stop, each position once, in order."""

    @abstractmethod
    def content(self) -> str:
        """Return a hash by which all processes tell the same pictures and prompts from others."""


class PictureSource(Source):
    """Offer pictures that have a row in a table each."""

    @abstractmethod
    def table(self) -> pd.DataFrame:
        """Return file, prompt and model [N]; prompt_id and seed too where the source has them."""

    def content(self) -> str:
        """Return a hash of names, prompts and sizes: no file is read for it."""
        table = self.table()
        digest = hashlib.blake2b(str(_size(self.name)).encode(), digest_size=8)
        for file, prompt in zip(table["file"], table["prompt"], strict=True):
            digest.update(f"{file}\0{prompt}\0{_size(file)}\0".encode())
        return digest.hexdigest()


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):  # in a tar or a table
        return None


@dataclass(frozen=True)
class Files(PictureSource):
    """Offer picture files of a table with file, prompt_id, prompt, seed and model.

    faults: why a picture cannot be scored, where that is known, by file.
    """

    rows: pd.DataFrame
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the first file."""
        return str(self.rows["file"].iloc[0])

    def __len__(self) -> int:
        return len(self.rows)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the files at these positions."""
        part = self.rows.iloc[start:stop]
        for position, (file, prompt) in enumerate(zip(part["file"], part["prompt"], strict=True), start):
            yield Item(position, file, prompt, file, self.faults.get(file))

    def table(self) -> pd.DataFrame:
        """Return the table."""
        return self.rows


@dataclass(frozen=True)
class Joined(PictureSource):
    """Offer several sources one after the other, with other prompts where `prompts` [N] is given."""

    parts: Sequence[PictureSource]
    prompts: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """Return the names of the parts."""
        return ", ".join(part.name for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the pictures of the parts that these positions lie in."""
        begin = 0
        for part in self.parts:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            for item in part.items(low, high) if low < high else ():
                position = item.position + begin
                prompt = item.prompt if self.prompts is None else self.prompts[position]
                yield item._replace(position=position, prompt=prompt)
            begin += len(part)

    def content(self) -> str:
        """Return a hash of the parts and of the prompts that are given."""
        parts = [part.content() for part in self.parts]
        return hashlib.blake2b(repr((parts, self.prompts)).encode(), digest_size=8).hexdigest()

    def table(self) -> pd.DataFrame:
        """Return the tables below one another; pictures of equal prompts share a prompt_id, unless they had one."""
        whole = pd.concat([part.table() for part in self.parts], ignore_index=True)
        if self.prompts is not None:
            whole["prompt"] = list(self.prompts)
        if self.prompts is not None or "prompt_id" not in whole or whole["prompt_id"].isna().any():
            whole["prompt_id"] = pd.factorize(whole["prompt"])[0]
        whole["seed"] = whole["seed"].fillna(0).astype(int) if "seed" in whole else 0
        return whole
