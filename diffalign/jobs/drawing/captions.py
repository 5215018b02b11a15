"""What people write beside their pictures to say what these show: text files, captions.json, metadata, a manifest."""

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
from diffalign.jobs.drawing.pictures import SUFFIXES
from diffalign.text_files import caption_fault, read_text, well_formed

TEXTS = (".txt", ".caption", ".prompt")
CAPTIONS = ("caption", "prompt", "text")  # what a JSON object or a column may call it


def beside(picture: Path) -> str:
    """Return the text in a file beside a picture, or ""; raise DataError where that is no text."""
    for suffix in TEXTS:
        file = picture.with_suffix(suffix)
        if file.is_file():
            return well_formed(read_text(file).strip())
    return ""


def of_folder(folder: Path) -> dict[str, str]:
    """Return the captions by name without its end that files about a whole folder hold."""
    if (folder / FILE_NAME).is_file():
        table = Manifest.read(folder).table
        return dict(zip(table["file"].map(lambda name: Path(name).stem), table["prompt"], strict=True))
    for file in (folder / CAPTIONS_FILE, folder.resolve().parent / CAPTIONS_FILE):
        if file.is_file():
            return _of_names(read_captions(file), file)
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    return _of_metadata(file) if file else {}


def _of_names(written: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the captions of a captions.json, whose names may have their ends."""
    found = {}
    for number, (name, caption) in enumerate(written.items()):
        stem = Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name
        found[stem] = check_caption(caption, Place(str(file), number, "entry")).strip()
    return found


def _of_metadata(file: Path) -> dict[str, str]:
    table = read_columns(file)
    caption = next((name for name in CAPTIONS if name in table), None)
    if "file_name" not in table or caption is None:
        raise DataError(f"{file} needs file_name and one of {', '.join(CAPTIONS)}; it has {', '.join(table)}.")
    captions(table, caption, file)  # judges them
    return {
        Path(name).stem: well_formed(text).strip()
        for name, text in zip(table["file_name"], table[caption], strict=True)
        if isinstance(name, str) and caption_fault(text) is None
    }
