"""The parquet files that a path, a pattern or a folder stands for."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import DataError, suggestion
from diffalign.pictures import is_hidden

PARQUET = ".parquet"
# train-00000-of-00645-b66ac786bf6fb553.parquet, train-00000.parquet or train.parquet: split "train".
SHARD = re.compile(r"-\d+-of-\d+")
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "validation_unique", "test_unique"}
SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z_]\w*?)(?:-\d+(?:-of-\d+)?(?:-\w+)?)?\.(?i:parquet)")


def parquet_files(source: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """Return the parquet files `source` stands for, sorted; of a folder named after splits, those of `split`."""
    if not isinstance(source, str | Path):
        files = [existing(file) for file in source]
        if not files:
            raise DataError("The list of parquet files is empty.")
        return files
    if found := matching(source):
        return found
    root = existing(source)
    if root.is_file():
        return [root]
    files = below(root, PARQUET)
    if not files:
        raise DataError(f"{root} holds no parquet file.")
    splits = {file: _split_of(file, root) for file in files}
    found = sorted({*splits.values()})
    named_after_splits = not SPLITS.isdisjoint(found) or any(SHARD.search(file.name) for file in files)
    if split == "train" and not named_after_splits:
        return files  # cats.parquet, dogs.parquet: names of our user's own
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        raise DataError(
            f'{root} has no parquet files of split "{split}"; it has {", ".join(found)}.{suggestion(split, found)}'
        )
    return chosen


def matching(source: str | Path) -> list[Path]:
    """Return the files that a pattern stands for, sorted; none for what is no pattern."""
    if not glob.has_magic(str(source)) or Path(source).exists():
        return []
    files = sorted(Path(file) for file in glob.glob(str(source), recursive=True))
    if not files:
        raise DataError(f"No file matches {source}.")
    return files


def below(root: Path, suffix: str) -> list[Path]:
    """Return the files below a folder that end so, in capitals or not, sorted; hidden ones are left out."""
    found = (file for file in root.rglob("*") if file.suffix.lower() == suffix)
    return sorted(file for file in found if not is_hidden(file.relative_to(root)))


def _split_of(file: Path, root: Path) -> str:
    """Return the split a file belongs to: the folder it is in (train/0000.parquet) or the start of its name."""
    match = SPLIT_FILE.fullmatch(file.name)
    return match["split"] if match else file.parent.name if file.parent != root else "unnamed"


def existing(source: str | Path) -> Path:
    """Return a path that exists; raise DataError otherwise."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"There is no file or folder {path}.{suggestion(path.name, near)}")
