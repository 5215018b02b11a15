"""What `datasets` writes: folders of save_to_disk, whose files say which Arrow files belong to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from diffalign.data.tables import read_json
from diffalign.errors import DataError
from diffalign.pictures import Reach

if TYPE_CHECKING:
    import datasets

ARROW = (".arrow", ".feather")
STATE, SPLITS = "state.json", "dataset_dict.json"  # of a data set, and of several that are its splits


def is_saved(folder: Path) -> bool:
    """Tell whether a folder is one of save_to_disk."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def saved_files(folder: Path, reach: Reach) -> list[Path]:
    """Return the Arrow files of a data set.

    Raises:
        DataError: its state.json is not one of `datasets`.
        OutsideError: it names files that lead out of `reach`.
    """
    names = [_field(part, "filename", folder) for part in _list(read_json(folder / STATE), "_data_files", folder)]
    return [reach.file(Path(folder.relative_to(reach.folder), name)) for name in names]


def open_saved(place: Path, split: str, reach: Reach) -> "datasets.Dataset":
    """Open a folder of save_to_disk, of several splits the one asked for, or an Arrow file.

    Raises:
        DataError: it cannot be read, or has no such split.
        OutsideError: it names files that lead out of `reach`.
    """
    import datasets

    if place.is_dir():
        place = _split_of(place, split, reach)
        saved_files(place, reach)
    try:
        return datasets.load_from_disk(str(place)) if place.is_dir() else datasets.Dataset.from_file(str(place))
    except (OSError, ValueError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{place} cannot be read by datasets ({error}). Save it again.") from error


def _split_of(folder: Path, split: str, reach: Reach) -> Path:
    """Return the folder of a split, or the folder itself where it has none."""
    if not (folder / SPLITS).is_file():
        return folder
    splits = _list(read_json(folder / SPLITS), "splits", folder)
    if split not in splits:
        raise DataError(f'{folder} has no split "{split}"; it has {", ".join(map(str, splits))}.')
    return reach.file(split)


def _list(record: Any, name: str, folder: Path) -> list[Any]:
    found = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(found, list):
        raise DataError(f'{folder} is no folder of save_to_disk: "{name}" is missing. Save it again.')
    return found


def _field(record: Any, name: str, folder: Path) -> str:
    found = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(found, str):
        raise DataError(f'{folder} is no folder of save_to_disk: "{name}" is missing. Save it again.')
    return found
