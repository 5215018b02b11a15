"""Captions that are longer than what text encoders read: how many, said before they are encoded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.jobs import skipped
from diffalign.jobs.training.meta_model import MetaModel

COUNTED = 50_000  # captions that are tokenised, all over the data: of more, a share is told


@dataclass(frozen=True)
class Long:
    """Count the captions that are longer than `read` tokens."""

    long: int
    counted: int
    of: int
    longest: int  # tokens, marks included
    read: int

    def describe(self, config: Config, family: type[Backbone]) -> str:
        """Word it."""
        which = f"{self.of:,}" if self.counted == self.of else f"a sample of {self.counted:,} (of {self.of:,})"
        count = f"{self.long:,} of {which} distinct captions"
        if not self.long:
            return f"{count} are longer than the {self.read} tokens that are read"
        found = f"{count} are longer than the {self.read} tokens that are read, the longest has {self.longest:,}"
        if config.data.long_prompts == "chunk":
            return f"{found}: they are read in chunks (data.long_prompts)"
        fix = "" if family.long_prompts_fault("chunk") else "; data.long_prompts=chunk reads all of them"
        return f"{found}: what is beyond is cut{fix}"


def count(family: type[Backbone], tokenizers: Sequence[Any], captions: Iterable[str]) -> Long | None:
    """Count long captions among distinct ones; None without tokenizers or captions."""
    distinct = list(dict.fromkeys(captions))
    if not tokenizers or not distinct:
        return None
    sample = distinct[:: -(-len(distinct) // COUNTED)]
    counts, read = family.token_counts(tokenizers, sample)
    return Long(sum(number > read for number in counts), len(sample), len(distinct), max(counts), read)


def rows(config: Config, model: MetaModel, captions: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Yield a line of the dry run, if captions and tokenizers are here."""
    found = count(model.kind, model.tokenizers(), captions) if captions else None
    if found is not None:
        yield "captions", found.describe(config, model.kind)


def tell(config: Config, backbone: Backbone, source: Any, console: Console) -> None:
    """Say how many captions of a source are longer than what is read, if some are; a stream is not read for it."""
    if getattr(source, "window", None):
        return
    captions = source.texts if config.is_online else source.captions()
    found = count(type(backbone), backbone.tokenizers, captions)
    if found is not None and found.long:
        skipped.say(f"{found.describe(config, type(backbone))}.", console)
