"""WebDataset shards: a tar whose members cat.jpg and cat.txt, or cat.json, belong together."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from diffalign.errors import DataError
from diffalign.jobs.drawing.pictures import SUFFIXES
from diffalign.jobs.scoring.items import Item, PictureSource, Span
from diffalign.text_files import caption_fault, decode, parse_json, shown, well_formed

TEXTS = (".txt", ".caption", ".prompt")
CAPTIONS = ("caption", "prompt", "text")  # what a JSON object or a column may call it
NO_CAPTION = "it has no caption"


class _Member(NamedTuple):
    name: str
    key: str  # what the members of a sample share
    span: Span


class TarShard(PictureSource):
    """Offer the pictures of an uncompressed tar. Opening reads its headers and captions; pictures stay where they are.

    Raises:
        DataError: it is no tar, is compressed, or holds no picture.
    """

    def __init__(self, file: Path, *, with_prompts: bool = True):
        self.name, self.with_prompts = str(file), with_prompts
        self.members: list[_Member] = []
        self.captions: dict[str, str] = {}
        self.faults: dict[str, str] = {}  # why a caption is none
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    self._add(tar, member)
                    tar.members = []  # it keeps every header otherwise
        except (tarfile.TarError, OSError) as error:
            if self.members:
                return  # it breaks off: the last picture will be found to be cut
            raise DataError(f"Cannot read {file} as a tar shard ({error}). Compressed shards: gunzip first.") from error
        if not self.members:
            raise DataError(f"{file} holds no picture ({', '.join(SUFFIXES)}).")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = PurePosixPath(member.name)
        stem, dot, rest = path.name.partition(".")
        key, suffix = str(path.parent / stem), f".{rest.lower().rpartition('.')[2]}" if dot else ""
        if not member.isfile() or not stem:
            return
        if suffix in SUFFIXES:
            self.members.append(_Member(member.name, key, Span(self.name, member.offset_data, member.size)))
        elif suffix in TEXTS or suffix == ".json":
            self._add_text(key, suffix, tar.extractfile(member).read(), member.name)

    def _add_text(self, key: str, suffix: str, content: bytes, name: str) -> None:
        """Take a caption; of several the one of a text file."""
        try:
            text = decode(content, name)
            if suffix == ".json" and key in self.captions:
                return
            found = _from_json(text) if suffix == ".json" else text.strip()
        except DataError as error:
            self.faults.setdefault(key, str(error).rstrip("."))
            return
        fault = caption_fault(found)
        if fault is None:
            self.captions[key] = well_formed(found)
        elif found is not None:
            self.faults.setdefault(key, fault[1])

    def __len__(self) -> int:
        return len(self.members)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the members at these positions."""
        for position, member in enumerate(self.members[start:stop], start):
            caption = self.captions.get(member.key)
            fault = None
            if caption is None and self.with_prompts:
                fault = self.faults.get(member.key, NO_CAPTION)
            yield Item(position, shown(f"{self.name}:{member.name}"), caption or "", member.span, fault)

    def table(self) -> pd.DataFrame:
        """Return file ("shard.tar:member"), prompt and model (the shard) of every picture."""
        return pd.DataFrame(
            {
                "file": [shown(f"{self.name}:{member.name}") for member in self.members],
                "prompt": [self.captions.get(member.key, "") for member in self.members],
                "model": shown(self.name),
            }
        )


def _from_json(text: str) -> Any:
    """Return the caption of an object, whatever it is; None where nothing is called so."""
    try:
        record = parse_json(text)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    named = [record[name] for name in CAPTIONS if record.get(name) is not None]
    return next((value for value in named if caption_fault(value) is None), named[0] if named else None)
