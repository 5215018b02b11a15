"""The record of a folder of drawn pictures: which file shows which prompt and seed, and how it was drawn."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import DataError
from diffalign.pictures import OutsideError, Reach, tell

FILE_NAME = "manifest.parquet"
_METADATA_KEY = b"diffalign"
_KEYS = ["prompt_id", "seed"]
NOISE = "noise"  # what the picture was drawn from (denoising/initial_noise.py); absent from older manifests
_COLUMNS = ["prompt_id", "prompt", "seed", "file", NOISE]
_FILE = "what should be its folder is a file"
_REASONS = {errno.ENOSPC: "the disk is full", errno.EEXIST: _FILE, errno.ENOTDIR: _FILE}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; move it to `path` on success, so that what exists is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = _REASONS.get(error.errno) or error.strerror or str(error)
        raise DataError(
            f"Could not write {path}: {reason}. What was finished before is intact; fix this and run again to go on."
        ) from error
    finally:
        with suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Manifest:
    """List the pictures of one model: `table` has prompt_id, prompt, seed, file and noise, one row a picture."""

    directory: Path
    table: pd.DataFrame
    settings: Mapping[str, Any]  # all that shaped the pictures but the weights
    identity: str  # the weights

    @classmethod
    def plan(
        cls, directory: str | Path, requested: pd.DataFrame, *, settings: Mapping[str, Any], identity: str
    ) -> Self:
        """Write the manifest of pictures about to be drawn, adding to one that is there; return the requested part.

        It is written before the first picture, so that an interrupted folder still knows what it holds.
        """
        directory = Path(directory)
        if duplicated := int(requested.duplicated(_KEYS).sum()):
            raise DataError(f"{duplicated} pictures repeat a prompt and seed drawn already. Use another seed for each.")
        files = [f"{row.prompt_id:05d}-{row.seed}.png" for row in requested.itertuples()]
        table = _columns(requested.assign(file=files))
        settings = json.loads(json.dumps(settings, default=str))
        planned = cls(directory, table, settings, identity)
        whole = planned
        if (directory / FILE_NAME).exists():
            before = cls.read(directory)
            before._require_same(planned)
            # The last that is known of every column: an older manifest has no noise.
            merged = _columns(pd.concat([before.table, table]).groupby(_KEYS, sort=False, as_index=False).last())
            whole = cls(directory, merged, settings, identity)
        whole._write()
        return planned

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read the manifest of a folder; raise DataError if there is none or it cannot be read."""
        file = Path(directory) / FILE_NAME
        if not file.exists():
            raise DataError(f"{file} does not exist. Expected a folder of pictures drawn by diffalign.")
        try:
            stored = pq.read_table(file)
            record = json.loads(stored.schema.metadata[_METADATA_KEY])
            table = _columns(stored.to_pandas())
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file} is not a manifest written by diffalign ({error}). Draw into a new folder."
            ) from error
        return cls(Path(directory), _within(Path(directory), table), record["settings"], record["identity"])

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the order of the table."""
        return self.table["prompt"].tolist()

    @property
    def columns(self) -> dict[str, list[int]]:
        """The prompt_id and seed of every picture, as `score_table` takes them."""
        return {name: self.table[name].tolist() for name in _KEYS}

    @cached_property
    def paths(self) -> list[Path]:
        """The files, in the order of the table."""
        return [self.directory / name for name in self.table["file"]]

    @cached_property
    def images(self) -> dict[tuple[int, int], Path]:
        """The file of every (prompt_id, seed)."""
        keys = zip(self.table["prompt_id"].tolist(), self.table["seed"].tolist(), strict=True)
        return dict(zip(keys, self.paths, strict=True))

    def require_comparable(self, other: Self) -> None:
        """Raise DataError unless both models drew the same prompts and seeds with the same settings."""
        self._require_same_settings(other)
        only = set(self.images) ^ set(other.images)
        if only:
            raise DataError(
                f"{len(only)} pictures exist in only one of {self.directory} and {other.directory}, the first is "
                f"prompt {min(only)[0]} with seed {min(only)[1]}. Draw the same prompts and seeds with both models."
            )
        self._require_same_prompts(other)

    def _require_same(self, other: Self) -> None:
        if self.identity != other.identity:
            raise DataError(
                f'{self.directory} holds pictures of "{self.identity}", not of "{other.identity}". '
                "Use another folder or delete this one."
            )
        self._require_same_settings(other)
        self._require_same_prompts(other)

    def _require_same_settings(self, other: Self) -> None:
        for key in sorted(set(self.settings) | set(other.settings)):
            here, there = self.settings.get(key), other.settings.get(key)
            if here != there:
                others = "new ones" if other.directory == self.directory else f"those of {other.directory}"
                raise DataError(
                    f"The pictures in {self.directory} were drawn with {key} = {here!r}, {others} with {there!r}. "
                    "Use the same settings, or another folder."
                )

    def _require_same_prompts(self, other: Self) -> None:
        both = self.table.merge(other.table, on=_KEYS, suffixes=("", "_other"))
        changed = both[both["prompt"] != both["prompt_other"]]
        if len(changed):
            row = changed.iloc[0]
            raise DataError(
                f"Prompt {row.prompt_id} is {row.prompt!r} in {self.directory} but {row.prompt_other!r} now. "
                "Use the same list of prompts, or another folder."
            )

    def _write(self) -> None:
        record = json.dumps({"settings": self.settings, "identity": self.identity})
        table = pa.Table.from_pandas(self.table, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA_KEY: record.encode()})
        with atomic_write(self.directory / FILE_NAME) as temporary:
            pq.write_table(table, temporary)


def _within(directory: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose files lie in the folder; tell of others, which diffalign does not write."""
    reach, kept = Reach(directory), []
    for name in table["file"]:
        try:
            kept.append(bool(reach.file(str(name))))
        except OutsideError:
            kept.append(False)
    tell(directory / FILE_NAME, Counter({"leading out of the folder": kept.count(False)} if not all(kept) else {}))
    return table if all(kept) else table[kept].reset_index(drop=True)


def _columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return what a manifest holds of each picture; raise KeyError if some of it is missing."""
    return table[[name for name in _COLUMNS if name != NOISE or name in table]]


def noises_of(files: Sequence[str | Path]) -> list[str | None]:
    """Return what pictures were drawn from by the manifests beside them; None where none says it."""
    known: dict[Path, str | None] = {}
    for folder in {Path(file).parent for file in files}:
        if (folder / FILE_NAME).is_file():
            manifest = Manifest.read(folder)
            known |= dict(zip(manifest.paths, manifest.table.get(NOISE, [None] * len(manifest.table)), strict=True))
    return [known.get(Path(file)) for file in files]
