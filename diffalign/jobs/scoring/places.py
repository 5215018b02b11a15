"""Find out what the places on a command line are: pictures, tar shards, parquet files, JSON lines."""

import glob
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path, PurePath

import pandas as pd

from diffalign.data.saved import STATE, saved_files
from diffalign.errors import DataError
from diffalign.evaluation.manifest import FILE_NAME
from diffalign.jobs.drawing import captions, pictures
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.scoring.items import Files, Joined, PictureSource
from diffalign.jobs.scoring.tabular import ArrowRows, JsonRows, ParquetRows
from diffalign.jobs.scoring.tars import NO_CAPTION, TarShard
from diffalign.pictures import Reach, is_hidden, is_picture, nfc
from diffalign.text_files import nameable, shown, well_formed

BRACES = re.compile(r"\{([^{}]*)\}")
TABLES = {".parquet": ParquetRows, ".jsonl": JsonRows, ".ndjson": JsonRows, ".arrow": ArrowRows}
CONTAINERS = (".tar", *TABLES)
UNNAMEABLE = "its name is not UTF-8, which no table can hold: rename it"
METADATA = "metadata.jsonl"  # beside the pictures of an imagefolder


def expand_braces(text: str) -> list[str]:
    """Return what a shell makes of braces: "s-{008..010}.tar" is three names, "{a,b}.tar" two.

    Raises:
        DataError: a range that counts down.
    """
    match = next((m for m in BRACES.finditer(text) if "," in m[1] or ".." in m[1]), None)
    if match is None:
        return [text]
    choices = match[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise DataError(f'"{match[0]}" counts down: write {{{span[2]}..{span[1]}}}.')
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    return [name for choice in choices for name in expand_braces(text[: match.start()] + choice + text[match.end() :])]


def open_places(
    places: Sequence[str],
    *,
    prompts_file: Path | None = None,
    prompt: str | None = None,
    with_prompts: bool = True,
    image_column: str | None = None,
    caption_column: str | None = None,
    root: Path | None = None,
) -> PictureSource:
    """Return the pictures of files, folders, globs, tar shards, parquet files and JSON lines, in that order.

    Args:
        places: as on the command line; braces and globs are expanded here where no shell has done it.
        prompts_file: one prompt a picture, in place of the captions.
        prompt: one for all.
        with_prompts: whether any scorer reads them; otherwise none are needed.
        image_column: of parquet and JSON lines; by default one of the usual names.
        caption_column: likewise.
        root: pictures that data names, or links lead to, may lie in it too.

    Raises:
        DataError: a place does not exist or holds nothing, or prompts are missing or too many.
    """
    if prompts_file is not None and prompt is not None:
        raise DataError("Give --prompts FILE (one a picture) or --prompt TEXT (for all), not both.")
    prompt = None if prompt is None else well_formed(prompt)
    own = with_prompts and prompts_file is None and prompt is None  # captions come from the data
    columns = {"image": image_column, "caption": caption_column, "with_prompts": own, "root": root}
    named = [name for place in places for written in _written(place) for name in _contents(written, root)]
    parts: list[PictureSource] = []
    for suffix, group in groupby(named, key=lambda name: _container(name)):
        names = list(group)
        if suffix is None:
            parts.append(_files(names, prompts_file if len(names) == len(named) else None, prompt, own, root))
        elif suffix == ".tar":
            parts += [TarShard(Path(name), with_prompts=own) for name in names]
        else:
            parts += [TABLES[suffix](Path(name), **columns) for name in names]
    if len(parts) == 1 and isinstance(parts[0], Files):
        return parts[0]
    return Joined(parts, _prompts(prompts_file, prompt, sum(map(len, parts))))


def _prompts(file: Path | None, prompt: str | None, count: int) -> list[str] | None:
    if file is None:
        return None if prompt is None else [prompt] * count
    prompts = read_prompts(file)
    if len(prompts) != count:
        raise DataError(f"{file} has {len(prompts)} prompts for {count} pictures. One prompt a picture is needed.")
    return prompts


def _files(names: list[str], prompts_file: Path | None, prompt: str | None, own: bool, root: Path | None) -> Files:
    files = pictures.find(names, root)
    faults = {shown(file): UNNAMEABLE for file in files if not nameable(file)}
    known = all((folder / FILE_NAME).is_file() for folder in {file.parent for file in files})
    if own and not known:
        return _with_captions(files, faults, root)
    if not own and prompts_file is None and prompt is None:
        prompt = None if known else ""  # nobody reads it
    return Files(pictures.with_prompts(files, prompts_file, prompt), faults)


def _with_captions(files: list[Path], faults: dict[str, str], root: Path | None) -> Files:
    """Return picture files with what is written beside them; one without is a fault, none at all an error."""
    reaches = {folder: Reach.of(folder, root) for folder in {file.parent for file in files}}
    known = {folder: captions.of_folder(reach) for folder, reach in reaches.items()}
    prompts: list[str] = []
    for file in files:
        try:
            beside = captions.beside(file, reaches[file.parent])
            prompts.append(beside or known[file.parent].get(nfc(file.stem), ""))
            fault = None if prompts[-1] else NO_CAPTION
        except DataError as error:
            prompts.append("")
            fault = str(error).rstrip(".")
        if fault:
            faults.setdefault(shown(file), fault)
    if not any(prompts) and NO_CAPTION in faults.values():
        return Files(pictures.with_prompts(files, None, None))  # says what is missing
    rows = pd.DataFrame({"file": list(map(shown, files)), "prompt": prompts})
    rows["model"] = [shown(file.parent) for file in files]
    return Files(rows.assign(prompt_id=pd.factorize(rows["prompt"])[0], seed=0), faults)


def _written(place: str) -> list[str]:
    """Return the names that braces stand for; a file that is really called so is meant itself."""
    return [place] if Path(place).expanduser().exists() else expand_braces(place)


def _container(name: str) -> str | None:
    path = Path(name)
    return path.suffix.lower() if path.suffix.lower() in CONTAINERS and not path.is_dir() else None


def _contents(name: str, root: Path | None) -> list[str]:
    """Return the containers in a folder or of a pattern, or the name itself: pictures are found by `pictures.find`."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / FILE_NAME).is_file():
        if (path / METADATA).is_file():
            return [str(path / METADATA)]
        if (path / STATE).is_file():
            return [str(file) for file in saved_files(path, Reach.of(path, root))]
        seen = [entry for entry in sorted(path.iterdir()) if not is_hidden(PurePath(entry.name))]
        if not any(map(is_picture, seen)):
            return [str(entry) for entry in seen if _container(str(entry))] or [name]
    if glob.has_magic(name) and not path.exists() and path.suffix.lower() in CONTAINERS:
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f'No file matches "{name}".')
        return found
    if _container(name) and not path.is_file():  # a FIFO would be waited for
        raise DataError(f'There is no file "{name}".')
    return [str(path)] if _container(name) else [name]
