"""WebDataset shards: a tar whose members cat.jpg and cat.txt, or cat.json, belong together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from diffalign.data.tars import Member, members
from diffalign.errors import DataError
from diffalign.jobs.drawing.captions import CAPTIONS, TEXTS
from diffalign.jobs.scoring.items import Item, PictureSource
from diffalign.pictures import SUFFIXES
from diffalign.text_files import caption_fault, parse_json, shown, well_formed

NO_CAPTION = "it has no caption"


class TarShard(PictureSource):
    """Offer the pictures of an uncompressed tar. Opening reads its headers and captions; pictures stay where they are.

    Raises:
        DataError: it is no tar, is compressed, or holds no picture.
    """

    def __init__(self, file: Path, *, with_prompts: bool = True):
        self.name, self.with_prompts = str(file), with_prompts
        self.members: list[Member] = []
        self.captions: dict[str, str] = {}
        self.faults: dict[str, str] = {}  # why a caption is none
        for member in members(file):
            if member.suffix in SUFFIXES:
                self.members.append(member)
            elif member.suffix in TEXTS or member.suffix == ".json":
                self._add_text(member)
        if not self.members:
            raise DataError(f"{file} holds no picture ({', '.join(SUFFIXES)}).")

    def _add_text(self, member: Member) -> None:
        """Take a caption; of several the one of a text file."""
        key, is_json = member.key, member.suffix == ".json"
        if is_json and key in self.captions:
            return
        try:
            text = member.text()
        except DataError as error:
            self.faults.setdefault(key, str(error).rstrip("."))
            return
        found = _from_json(text) if is_json else text.strip()
        fault = caption_fault(found)
        if fault is None:
            self.captions[key] = well_formed(found)
        elif not fault[0].startswith("empty"):
            self.faults.setdefault(key, fault[1])

    def __len__(self) -> int:
        return len(self.members)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the members at these positions."""
        for position, member in enumerate(self.members[start:stop], start):
            caption = self.captions.get(member.key)
            fault = member.fault
            if fault is None and caption is None and self.with_prompts:
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
