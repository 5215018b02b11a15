"""What people write beside their pictures to say what these show: text files, captions.json, metadata, a manifest."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data.local_files import CAPTIONS_FILE, read_captions
from diffalign.data.pairs import Place
from diffalign.data.records import METADATA
from diffalign.data.schema import check_caption
from diffalign.data.tables import captions, read_columns
from diffalign.errors import DataError
from diffalign.evaluation import Manifest
from diffalign.evaluation.manifest import FILE_NAME
from diffalign.pictures import OutsideError, Reach, is_picture, nfc
from diffalign.text_files import caption_fault, read_text, well_formed

TEXTS = (".txt", ".caption", ".prompt")
CAPTIONS = ("caption", "prompt", "text")  # what a JSON object or a column may call it


def beside(picture: Path, reach: Reach) -> str:
    """Return the text in a file beside a picture of a folder, or ""; raise DataError where it is none or leads out."""
    for suffix in TEXTS:
        if (file := _file(f"{picture.stem}{suffix}", reach)) is not None:
            return well_formed(read_text(file).strip())
    return ""


def of_folder(reach: Reach) -> dict[str, str]:
    """Return the captions by name without its end, in NFC, that files about a whole folder hold.

    Raises:
        DataError: one is no such file, or leads out of `reach`.
    """
    folder = reach.folder
    if (folder / FILE_NAME).is_file():
        table = Manifest.read(folder).table
        return dict(zip(table["file"].map(lambda name: nfc(Path(name).stem)), table["prompt"], strict=True))
    above = folder.resolve().parent
    for place in (reach, Reach(above, reach.wider)):
        if (file := _file(CAPTIONS_FILE, place)) is not None:
            return _of_names(read_captions(file), file)
    found = (_file(name, reach) for name in METADATA)
    file = next((file for file in found if file is not None), None)
    return _of_metadata(file) if file else {}


def _file(name: str, reach: Reach) -> Path | None:
    """Return a file of a folder, or None where there is none; raise DataError where it is a link that leads out."""
    try:
        file = reach.file(name)
    except OutsideError as error:
        raise DataError(str(error)) from error
    return file if os.path.isfile(file) else None  # of a name that is too long, too


def _of_names(written: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the captions of a captions.json, whose names may have their ends."""
    found = {}
    for number, (name, caption) in enumerate(written.items()):
        stem = Path(name).stem if is_picture(name) else name
        found[stem] = check_caption(caption, Place(str(file), number, "entry")).strip()
    return found


def _of_metadata(file: Path) -> dict[str, str]:
    table = read_columns(file)
    caption = next((name for name in CAPTIONS if name in table), None)
    if "file_name" not in table or caption is None:
        raise DataError(f"{file} needs file_name and one of {', '.join(CAPTIONS)}; it has {', '.join(table)}.")
    captions(table, caption, file)  # judges them
    return {
        nfc(Path(name).stem): well_formed(text).strip()
        for name, text in zip(table["file_name"], table[caption], strict=True)
        if isinstance(name, str) and caption_fault(text) is None
    }
