"""Preferences whose images are files: a JSONL list, or a folder of winners beside a folder of losers."""

import mmap
import os
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data.fingerprints import digest_files, digest_images
from diffalign.data.pairs import Example, ImageRef, PairRow, Place, RowError
from diffalign.data.rejects import Rejects
from diffalign.data.schema import TIE, Schema, check_caption
from diffalign.data.source import PairSource
from diffalign.data.tables import read_json
from diffalign.errors import DataError
from diffalign.pictures import OutsideError, Reach, listed, nfc
from diffalign.text_files import line_at, mapped, numbered_lines, parse_json, read_text

CAPTIONS_FILE = "captions.json"


class FilePairs(PairSource):
    """Share what both layouts of image files need: opening checks every row and that its images exist."""

    lists: list[Path]  # files that say which pairs there are

    def _admit(self, rows: Iterator[Example | int | RowError], limit: int | None) -> Iterator[Example]:
        """Count rows, drop ties and unusable ones, and yield the others."""
        for row in rows:
            self.counts.rows += 1
            if isinstance(row, Example):
                self.has_preference |= row.preference is not None
                self.counts.pairs += 1
                yield row
                if self.counts.pairs == limit:
                    return
            elif isinstance(row, RowError):
                self.rejects.add(row)
            elif row == TIE:
                self.counts.ties += 1
            else:
                self.counts.unlabelled += 1

    @abstractmethod
    def _paths(self, index: int) -> tuple[Path, ...]: ...

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        listed = zip(self.lists, digest_files(self.lists, memo), strict=True)
        return {
            "format": type(self).__name__,
            "pairs": len(self),
            "files": [{"name": f.name, "bytes": f.stat().st_size, "blake2b": digest} for f, digest in listed],
            "images": digest_images([self._paths(index) for index in range(len(self))], memo),
        }


class JsonlPairs(FilePairs):
    """Read a JSONL file, one example a line; image paths are relative to the file.

    A line is {"prompt" or "caption", "chosen", "rejected"[, "preference"]}, preference = P(chosen preferred), or
    {"prompt" or "caption", "image_0", "image_1", "label_0"[, "label_1"]}, labels as in Pick-a-Pic. A preference of
    0.5 is a tie. Lists and single images are written as their schemas say (lists.py). Only the position of each line
    is kept in memory.
    """

    def __init__(
        self,
        file: Path,
        schema: Schema,
        *,
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
    ):
        super().__init__(rejects, schema)
        self._reach = Reach(file.parent, wider)
        self.name, self.file, self.schema, self.lists = str(file), file, schema, [file]
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
        kept = [(row.images[0].place.row, self._offset) for row in self._admit(self._lines(), max_samples)]
        self._lines_of, self._offsets = np.array(kept, dtype=np.int64).reshape(-1, 2).T
        self._check_usable()

    @cached_property
    def _content(self) -> mmap.mmap | bytes:
        return mapped(self.file)

    def _lines(self) -> Iterator[Example | int | RowError]:
        for number, offset, line in numbered_lines(self._content):
            self._offset = offset
            yield self._try(line, number)

    def _try(self, line: bytes, number: int) -> Example | int | RowError:
        try:
            row = self._parse(line, number, self.counts.pairs)
            if isinstance(row, Example):
                check_files(row)
            return self.fitting(row, Place(str(self.file), number, "line"))
        except RowError as error:
            return error

    def _parse(self, line: bytes, number: int, index: int) -> Example | int:
        place = Place(str(self.file), number, "line")
        try:
            record = parse_json(line)
        except ValueError as error:
            raise RowError(place, "malformed line", f"not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise RowError(place, "malformed line", f"expected a JSON object, got {type(record).__name__}")
        return self.schema.of_line(record, place).read(record, index, place, self._reach)

    def __len__(self) -> int:
        return len(self._offsets)

    def _fetch(self, index: int) -> Example:
        line = line_at(self._content, int(self._offsets[index]))
        return self._parse(line, int(self._lines_of[index]), index)

    def _paths(self, index: int) -> tuple[Path, ...]:
        return tuple(image.path for image in self._fetch(index).images)

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        return {**super()._describe(memo), "columns": self.schema.identity}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_content"}  # worker processes map anew


class FolderPairs(FilePairs):
    """Read winners from w/ and losers from l/, matched by file name without extension.

    The caption stands in a .txt beside the winner, or in captions.json {stem: caption} beside the two folders.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
    ):
        super().__init__(rejects)
        self._reach = Reach(folder, wider)
        self.name, self.folder, self.lists = str(folder), folder, []
        captions = read_captions(self._reach.file(CAPTIONS_FILE))
        winners, losers = (_images(folder / side, self._reach) for side in "wl")
        rows = (self._pair(stem, winners, losers, captions) for stem in sorted({*winners, *losers}))
        self._pairs = [(r.prompt, r.chosen.path, r.rejected.path) for r in self._admit(rows, max_samples)]
        self._check_usable()

    def _pair(
        self, stem: str, winners: dict[str, list[Path]], losers: dict[str, list[Path]], captions: dict[str, Any]
    ) -> PairRow | RowError:
        found = winners.get(stem) or losers[stem]
        place = Place(str(found[0]), self.counts.rows, "pair")
        for side, images in (("w", winners), ("l", losers)):
            if len(images.get(stem, ())) != 1:
                names = ", ".join(path.name for path in images.get(stem, ())) or "none"
                detail = f'expected one image "{stem}" in {self.folder / side}, got {names}'
                return RowError(place, "no partner", detail)
        chosen, rejected = winners[stem][0], losers[stem][0]
        beside = Path(chosen.parent.name, f"{chosen.stem}.txt")
        try:
            caption = captions[stem] if stem in captions else caption_beside(self._reach.file(beside), place)
            prompt = check_caption(caption, place)
        except FileNotFoundError:
            return RowError(place, "missing caption", f'expected {beside.name} beside it, or "{stem}" in captions.json')
        except OutsideError as error:
            return RowError(place, "outside the folder", str(error))
        except RowError as error:
            return error
        images = (ImageRef(path=path, place=place) for path in (chosen, rejected))
        return PairRow(self.counts.pairs, prompt, *images)

    def __len__(self) -> int:
        return len(self._pairs)

    def _fetch(self, index: int) -> PairRow:
        prompt, chosen, rejected = self._pairs[index]
        images = (ImageRef(path=path, place=Place(str(path), index, "pair")) for path in (chosen, rejected))
        return PairRow(index, prompt, *images)

    def _paths(self, index: int) -> tuple[Path, Path]:
        return self._pairs[index][1:]

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        prompts = blake2b("\0".join(prompt for prompt, *_ in self._pairs).encode(), digest_size=16)
        return {**super()._describe(memo), "prompts": prompts.hexdigest()}


def read_captions(file: Path) -> dict[str, Any]:
    """Return the captions by file name without its end that a captions.json holds; none if there is no such file."""
    if not file.is_file():
        return {}
    captions = read_json(file)
    if not isinstance(captions, dict):
        raise DataError(f"{file} must map file names without extension to captions, got {type(captions).__name__}.")
    return {nfc(name): caption for name, caption in captions.items()}


def caption_beside(file: Path, place: Place) -> str:
    """Return the caption in a text file; raise RowError where it is no text, FileNotFoundError where there is none."""
    if not file.is_file():  # a FIFO would be waited for
        raise FileNotFoundError(file)
    try:
        return read_text(file).strip()
    except (DataError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise RowError(place, "unreadable caption", reason) from error


def _images(folder: Path, reach: Reach) -> dict[str, list[Path]]:
    """Return the images of a folder by stem."""
    if not folder.is_dir():
        raise DataError(f'{folder} does not exist. The format "folders" needs w/ (winners) and l/ (losers) in it.')
    found: dict[str, list[Path]] = {}
    for path in listed(reach.file(folder.name), reach):
        found.setdefault(nfc(path.stem), []).append(path)
    return found


def check_files(row: Example) -> None:
    """Raise RowError unless the image files of an example exist."""
    for image in row.images:
        if image.path is not None and not os.path.isfile(image.path):  # of a name that is too long, too
            raise RowError(image.place, "missing image", f"there is no file {image.path}")
