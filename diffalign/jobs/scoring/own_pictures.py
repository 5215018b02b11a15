"""Pictures of one's own, to be compared: folders in which equal file names show the same prompt. No manifest needed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import pandas as pd
from rich.console import Console

from diffalign.data import RowError
from diffalign.data.local_files import CAPTIONS_FILE
from diffalign.data.pairs import ImageRef
from diffalign.errors import DataError, UserError
from diffalign.evaluation import Manifest
from diffalign.evaluation.manifest import FILE_NAME, atomic_write
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.jobs import skipped
from diffalign.jobs.drawing import captions, models
from diffalign.pictures import Reach, is_hidden, is_picture, listed, nfc
from diffalign.text_files import nameable, shown

Found = Mapping[str, Mapping[str, list[Path]]]  # folder -> name without its end -> files


@dataclass(frozen=True)
class Folder:
    """Hold a folder of pictures under a name."""

    name: str
    path: Path

    @classmethod
    def of(cls, spec: str) -> "Folder | None":
        """Return what "name=FOLDER" or "FOLDER" means; None where that is no folder of pictures.

        A model is none, though some come with a picture of what they draw.
        """
        name, place = models.split_name(spec)
        path = Path(place).expanduser()
        if not path.is_dir():
            return None
        is_model = (path / "model_index.json").is_file() or any(path.glob("*.safetensors"))
        pictures = (is_picture(entry) and not is_hidden(PurePath(entry.name)) for entry in path.iterdir())
        holds_pictures = (path / FILE_NAME).is_file() or (any(pictures) and not is_model)
        return cls(name or path.resolve().name, path) if holds_pictures else None

    @property
    def has_manifest(self) -> bool:
        """Whether diffalign drew it."""
        return (self.path / FILE_NAME).is_file()


def open_folders(
    folders: Sequence[Folder], unusable: Path, console: Console, root: Path | None = None
) -> dict[str, Manifest]:
    """Return the pictures that all folders have, by folder.

    Drawn by diffalign, they are matched by prompt and seed and must be comparable. Otherwise by file name without its
    end; the prompt is in a .txt beside a picture, in captions.json ({name: caption}, in the folder or beside it), in
    metadata.jsonl or metadata.csv (file_name and a caption), in the manifest if one folder has one, or else it is the
    file name. What only some folders have, cannot be decoded, or lies outside its folder is left out and told.

    Args:
        folders: two or more, under different names.
        unusable: where what was left out is listed.
        console: where to tell.
        root: links in the folders may lead there too.

    Raises:
        UserError: fewer than two folders, or two of one name.
        DataError: nothing in common, or two captions for one name.
    """
    names = [folder.name for folder in folders]
    if len(names) < 2:
        only = names[0] if names else "nothing"
        raise UserError(f"Only {only} is named: two or more folders of pictures are needed to choose between.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'Two folders are named "{twice[0]}". Name them apart: first=FOLDER second=FOLDER.')
    if all(folder.has_manifest for folder in folders):
        return {folder.name: Manifest.read(folder.path) for folder in folders}
    found = {folder.name: _by_stem(folder.path) for folder in folders}
    stems = list(dict.fromkeys(stem for files in found.values() for stem in files))
    faults = {stem: fault for stem in stems if (fault := _fault(stem, folders, found, root))}
    _tell(faults, len(stems), unusable, console)
    common = [stem for stem in stems if stem not in faults]
    if not common:
        raise DataError(f"{', '.join(names)} have no picture of equal name that can be read. Look into {unusable}.")
    prompts = _prompts(common, folders, found, root, console)
    ids = pd.Series(pd.factorize(pd.Series(prompts))[0])
    table = pd.DataFrame({"prompt_id": ids, "prompt": prompts, "seed": ids.groupby(ids).cumcount()})
    return {
        folder.name: Manifest(
            folder.path,
            table.assign(file=[found[folder.name][stem][0].name for stem in common]),
            settings={},
            identity=f"pictures of {folder.path}",
        )
        for folder in folders
    }


def compared_as_they_are(
    specs: Sequence[str], out: Path, limit: int | None, console: Console
) -> tuple[PromptSet, dict[str, Manifest]]:
    """Return the prompts and pictures of folders that are compared as they are; see `open_folders`.

    Raises:
        UserError: one of them is a model, which needs to be told what to draw.
    """
    folders = [Folder.of(spec) for spec in specs]
    if wrong := next((spec for spec, folder in zip(specs, folders, strict=True) if folder is None), None):
        raise UserError(
            f'"{wrong}" is no folder of pictures: say with --prompts what it shall draw, e.g. --prompts embedded.'
        )
    found = open_folders(folders, out / skipped.FILE, console)
    table = next(iter(found.values())).table
    prompts = table.drop_duplicates("prompt_id")[["prompt_id", "prompt"]].head(limit).reset_index(drop=True)
    kept = prompts["prompt_id"]
    parts = {name: replace(m, table=m.table[m.table["prompt_id"].isin(kept)]) for name, m in found.items()}
    return PromptSet("own pictures", prompts), parts


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in listed(folder, Reach(folder, (Path(folder.absolute().anchor),))):  # what leads out is told by name
        found.setdefault(nfc(path.stem), []).append(path)
    return found


def _fault(
    stem: str, folders: Sequence[Folder], found: Mapping[str, Mapping[str, list[Path]]], root: Path | None
) -> tuple[str, str] | None:
    """Return a reason and what exactly is wrong with the pictures of a name, or None."""
    for folder in folders:
        files = found[folder.name].get(stem, [])
        if len(files) != 1:
            return ("no partner", f"{folder.path} has none") if not files else ("several of one name", str(files[1]))
    for folder in folders:
        file = found[folder.name][stem][0]
        if not nameable(file):
            return "name", f"the name of {shown(file)} is not UTF-8, which no table can hold: rename it"
        if not Reach.of(folder.path, root).holds(file):
            return "outside the folder", f"{file} leads out of {folder.path}"
        try:
            ImageRef(path=file).load()
        except RowError as error:
            return error.reason, error.detail
    return None


def _tell(faults: Mapping[str, tuple[str, str]], total: int, listed: Path, console: Console) -> None:
    if not faults:
        listed.unlink(missing_ok=True)
        return
    with atomic_write(listed) as temporary:
        records = ({"name": stem, "reason": why, "detail": detail} for stem, (why, detail) in faults.items())
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    reasons = pd.Series([why for why, _ in faults.values()]).value_counts().to_dict()
    skipped.say(skipped.told(reasons, total, listed, "names of pictures"), console)


def _prompts(
    stems: Sequence[str], folders: Sequence[Folder], found: Found, root: Path | None, console: Console
) -> list[str]:
    """Return the prompt of every name; say how many are only the name."""
    reaches = {folder.path: Reach.of(folder.path, root) for folder in folders}
    written = {path: captions.of_folder(reach) for path, reach in reaches.items()}
    prompts, guessed = [], []
    for stem in stems:
        said: dict[str, Path] = {}
        for folder in folders:
            beside = captions.beside(found[folder.name][stem][0], reaches[folder.path])
            caption = beside or written[folder.path].get(stem, "")
            if caption:
                said.setdefault(caption, folder.path)
        if len(said) > 1:
            (one, here), (other, there) = list(said.items())[:2]
            raise DataError(f'The prompt of "{stem}" is {one!r} in {here} but {other!r} in {there}. Make them agree.')
        if not said:
            guessed.append(stem)
        prompts.append(next(iter(said), " ".join(stem.replace("_", " ").replace("-", " ").split()) or stem))
    if guessed:
        console.print(
            f'{len(guessed)} of {len(stems)} prompts are file names, such as "{guessed[0]}": write a .txt beside the '
            f"picture, or {CAPTIONS_FILE} into the folder, where that is not what it should show.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return prompts
