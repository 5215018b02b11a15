"""WebDataset shards: a tar whose members cat.jpg and cat.txt, or cat.json, belong together."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from diffalign.data.schema import MOST_CHARACTERS
from diffalign.errors import DataError
from diffalign.jobs.scoring.items import Item, PictureSource, Span
from diffalign.pictures import SUFFIXES, is_hidden, tell
from reward_models.pictures import open_regular

TEXTS = (".txt", ".caption", ".prompt")
CAPTIONS = ("caption", "prompt", "text")  # what a JSON object or a column may call it
NO_CAPTION = "it has no caption"
MOST_TEXT = 4 * MOST_CHARACTERS  # bytes of a caption; larger ones, and sparse ones that would be, are none


class _Member(NamedTuple):
    name: str
    key: str  # what the members of a sample share
    span: Span
    fault: str | None = None


class TarShard(PictureSource):
    """Offer the pictures of an uncompressed tar. Opening reads its headers and captions; pictures stay where they are.

    Raises:
        DataError: it is no tar, is compressed, or holds no picture.
    """

    def __init__(self, file: Path, *, with_prompts: bool = True):
        self.name, self.with_prompts = str(file), with_prompts
        self.members: list[_Member] = []
        self.captions: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()
        try:
            with open_regular(file) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
                for member in tar:
                    self._add(tar, member)
                    tar.members = []  # it keeps every header otherwise
        except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:  # of absurd headers, too
            if self.members:
                return  # it breaks off: the last picture will be found to be cut
            raise DataError(f"Cannot read {file} as a tar shard ({error}). Compressed shards: gunzip first.") from error
        tell(file, +self.left_out)
        if not self.members:
            raise DataError(f"{file} holds no picture ({', '.join(SUFFIXES)}).")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        stem, dot, rest = path.name.partition(".")
        key, suffix = str(path.parent / stem), f".{rest.lower().rpartition('.')[2]}" if dot else ""
        if not member.isfile() or is_hidden(path.relative_to(path.anchor)):
            self.left_out["hidden"] += member.isfile() and suffix in SUFFIXES
            return
        if suffix in SUFFIXES:
            span, fault = Span(self.name, member.offset_data, member.size), None
            if member.issparse():
                fault = "it is a sparse member, whose bytes do not stand in one place; pack the tar without --sparse"
            self.members.append(_Member(member.name, key, span, fault))
        elif (suffix in TEXTS or suffix == ".json") and member.size <= MOST_TEXT:
            content = tar.extractfile(member).read().decode("utf-8", "replace")
            if caption := _from_json(content) if suffix == ".json" else content.strip():
                self.captions[key] = caption

    def __len__(self) -> int:
        return len(self.members)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the members at these positions."""
        for position, member in enumerate(self.members[start:stop], start):
            caption = self.captions.get(member.key)
            fault = member.fault or (NO_CAPTION if caption is None and self.with_prompts else None)
            yield Item(position, f"{self.name}:{member.name}", caption or "", member.span, fault)

    def table(self) -> pd.DataFrame:
        """Return file ("shard.tar:member"), prompt and model (the shard) of every picture."""
        return pd.DataFrame(
            {
                "file": [f"{self.name}:{member.name}" for member in self.members],
                "prompt": [self.captions.get(member.key, "") for member in self.members],
                "model": self.name,
            }
        )


def _from_json(text: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict):
        return ""
    return next((record[name] for name in CAPTIONS if isinstance(record.get(name), str) and record[name].strip()), "")
