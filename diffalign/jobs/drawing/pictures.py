"""Find out which picture files a command line means, and which prompt belongs to each."""

import glob
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pandas as pd

from diffalign.errors import DataError, suggestion
from diffalign.evaluation import Manifest
from diffalign.evaluation.manifest import FILE_NAME
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.pictures import SUFFIXES, Reach, listed, natural, pick
from diffalign.text_files import shown


def find(places: Sequence[str], root: Path | None = None) -> list[Path]:
    """Return the picture files of files, folders and glob patterns.

    A folder of `diffalign generate` gives the pictures of its manifest. Folders and patterns are in natural order
    (2 before 10). Files that a shell has put into alphabetical order are put into natural order too: a list of prompts
    goes with the numbers in their names. Any other order of files is kept. In folders, links must not lead out of the
    folder or of `root`; hidden files are no pictures (see `diffalign.pictures.listed`).

    Raises:
        DataError: a place does not exist or holds no picture, or a picture is named twice.
    """
    files: list[Path] = []
    for place in places:
        files += _expand(place, root)
    explicit = all(Path(place).is_file() for place in places)
    if explicit and [str(file) for file in files] == sorted(str(file) for file in files):
        files = sorted(files, key=natural)
    seen: set[Path] = set()
    for file in files:
        if file in seen:
            raise DataError(f"{file} is given twice.")
        seen.add(file)
    return files


def with_prompts(files: Sequence[Path], prompts_file: Path | None, prompt: str | None) -> pd.DataFrame:
    """Return file, prompt_id, prompt, seed and model (the folder), one row a picture.

    Prompts come from a file with one a picture, from one text for all, or else from the manifests of the folders.

    Raises:
        DataError: there are no prompts, or not as many as pictures.
    """
    if prompts_file is not None and prompt is not None:
        raise DataError("Give --prompts FILE (one a picture) or --prompt TEXT (for all), not both.")
    table = pd.DataFrame({"file": list(map(shown, files)), "model": [shown(file.parent) for file in files]})
    if prompt is not None:
        return table.assign(prompt_id=0, prompt=prompt, seed=0)
    if prompts_file is None:
        return table.merge(_from_manifests(files), on="file", validate="one_to_one")
    prompts = read_prompts(prompts_file)
    if len(prompts) != len(files):
        raise DataError(
            f"{prompts_file} has {len(prompts)} prompts for {len(files)} pictures ({files[0].name} to "
            f"{files[-1].name}). One prompt a picture is needed, in the order of their names."
        )
    return table.assign(prompt_id=pd.factorize(pd.Series(prompts))[0], prompt=prompts, seed=0)


def _expand(place: str, root: Path | None) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        return _in_folder(path, root)
    if path.exists():
        return [path]
    if glob.has_magic(place):
        folder = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        reach = Reach.of(folder, root)
        if found := pick(folder, map(Path, glob.glob(str(path), recursive=True)), reach):
            return found
        raise DataError(f'No picture matches "{place}".')
    near = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f'There is no picture or folder "{place}".{suggestion(str(path), near)}')


def _in_folder(folder: Path, root: Path | None) -> list[Path]:
    if (folder / FILE_NAME).is_file():
        return Manifest.read(folder).paths
    files = listed(folder, Reach.of(folder, root))
    if not files:
        raise DataError(f'"{folder}" holds no picture ({", ".join(SUFFIXES)}).')
    return files


def _from_manifests(files: Sequence[Path]) -> pd.DataFrame:
    tables = []
    for folder in dict.fromkeys(file.parent for file in files):
        if not (folder / FILE_NAME).is_file():
            raise DataError(
                f'No prompts: "{folder}" has no {FILE_NAME} that would say them. Give --prompts FILE with one a '
                "picture, --prompt TEXT for all, or write NAME.txt beside each NAME.png."
            )
        manifest = Manifest.read(folder)
        tables.append(manifest.table.assign(file=[str(path) for path in manifest.paths]))
    known = pd.concat(tables, ignore_index=True)
    if missing := sorted({str(file) for file in files} - set(known["file"])):
        raise DataError(f"The manifest beside {missing[0]} does not list it. Give --prompts FILE or --prompt TEXT.")
    return known
