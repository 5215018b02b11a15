"""Preferences in tar shards of WebDataset: the members of a sample are its images, its caption and its labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.data.fingerprints import digest_files
from diffalign.data.pairs import Place, RowError
from diffalign.data.reading import Reading
from diffalign.data.records import Record, RecordPairs
from diffalign.data.rejects import Rejects
from diffalign.data.tars import Member, Span, members
from diffalign.errors import DataError
from diffalign.pictures import SUFFIXES, Reach
from diffalign.text_files import parse_json
from reward_models.pictures import PictureError

CAPTIONS = ("txt", "caption", "prompt")
SIDES = {"w": "chosen", "l": "rejected", "0": "image_0", "1": "image_1"}
UNREAD = b"unread"  # stands for an image while a sample is judged


class TarPairs(RecordPairs):
    """Read samples such as 000.jpg_0.jpg, 000.jpg_1.jpg, 000.label_0.txt and 000.txt; opening reads texts only.

    Images are called chosen and rejected, jpg_0 and jpg_1, image_0 and image_1, 0 and 1, or w and l, with or without
    the ending of a picture; a .json holds the rest: caption, labels, preference.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reading: Reading,
        *,
        max_samples: int | None = None,
        rejects: Rejects | None = None,
        wider: tuple[Path, ...] = (),
    ):
        self.lists, self.file, self.wider = list(files), files[0], wider
        name = str(files[0] if len(files) == 1 else files[0].parent)
        samples: dict[tuple[int, str], Any] = {}
        for number, file in enumerate(files):
            for member in members(file):
                samples.setdefault((number, member.key), []).append(member)
        records = [
            (Place(str(files[number]), row, "sample"), _record(found, Place(str(files[number]), row, "sample")))
            for row, ((number, _), found) in enumerate(samples.items())
        ]
        self._open(name, records, reading, max_samples, rejects)

    def placeholders(self, record: Any) -> Any:
        """Return a sample whose images are not read."""
        if not isinstance(record, dict):
            return record
        return {name: UNREAD if isinstance(value, Span) else value for name, value in record.items()}

    def loaded(self, record: Record, place: Place) -> Record:
        """Return a sample with the bytes of its images; raise RowError where the shard is cut."""
        try:
            return {name: value.read() if isinstance(value, Span) else value for name, value in record.items()}
        except (OSError, PictureError) as error:
            raise RowError(place, "missing image", str(error)) from error

    def _find_reach(self, record: Any) -> Reach:
        return Reach(self.file.parent, self.wider)

    def _describe(self, memo: Path | None) -> dict[str, Any]:
        listed = zip(self.lists, digest_files(self.lists, memo), strict=True)
        files = [{"name": f.name, "bytes": f.stat().st_size, "blake2b": digest} for f, digest in listed]
        return {"format": "TarPairs", "pairs": len(self), "files": files, "columns": self.schema.identity}


def _record(found: Sequence[Member], place: Place) -> Record | RowError:
    """Return what the members of a sample hold together."""
    record: Record = {}
    try:
        for member in found:
            field, _, ending = member.field.rpartition(".")
            is_unnamed = not field and (member.field in SIDES or member.field.startswith(("jpg_", "image_")))
            if member.suffix in SUFFIXES or is_unnamed:
                if member.fault:
                    return RowError(place, "broken image", f"{member.name}: {member.fault}")
                name = member.field if is_unnamed else field
                record[SIDES.get(name, name) or "image"] = member.span
            elif ending == "json":
                content = parse_json(member.text())
                record |= content if isinstance(content, dict) else {}
            elif member.field in CAPTIONS:
                record["caption"] = member.text().strip()
            elif ending in ("txt", "cls"):
                record[field or "label"] = _value(member.text().strip())
    except (DataError, ValueError) as error:
        return RowError(place, "unreadable sample", f"{found[0].key}: {str(error).rstrip('.')}")
    return record


def _value(text: str) -> Any:
    """Return the number that a text is, or the text."""
    try:
        return float(text)
    except ValueError:
        return text
