"""Which settings name files, and how what they name stays the same wherever one stands."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffalign import places
from diffalign.config.config import Config

Content = dict[str, Any]
Rewrite = Callable[..., str]  # of one path, as `places.anchor`

READ = {  # a path or a hub id
    "model": ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet_init"),
    "data": ("train_data_dir", "prompts_file", "annotations_file"),
}
SCORERS = {"data": ("scorer",), "rollout": ("scorer",)}  # NAME=PATH, several between commas
CODE = {"objective": ("name",)}  # FILE.py:NAME
MIXED = {"validation": ("validation_prompts",)}  # a prompt or a file
WRITTEN = {"data": ("cache_dir",), "train": ("output_dir",)}  # always from where one stands


def anchored(content: Content, folder: Path | None) -> Content:
    """Return what a file in `folder` (None: a shipped one) says, with the paths that it reads written as from here."""
    return _rewritten(content, partial(places.anchor, folder=folder), folder or Path())


def anchored_value(section: str, key: str, value: Any) -> Any:
    """Return the value of one setting that was given where one stands."""
    return anchored({section: {key: value}}, Path())[section][key]


def portable(config: Config) -> Config:
    """Return a configuration that says the same from every folder: what a run writes down, and is recognised by."""
    content = _rewritten(config.model_dump(), places.portable, Path())
    for section, keys in WRITTEN.items():
        content[section] |= {key: str(Path(content[section][key]).expanduser().absolute()) for key in keys}
    names = {*READ, *SCORERS, *MIXED, *WRITTEN}
    sections = {name: getattr(config, name).model_copy(update=content[name]) for name in names}
    return config.model_copy(update={**sections, "objective": content["objective"]})


def _rewritten(content: Content, path: Rewrite, folder: Path) -> Content:
    """Return a copy with every setting that names a file rewritten; values of a wrong type are left for the checks."""
    kinds: list[tuple[dict[str, tuple[str, ...]], Callable[[str], str]]] = [
        (READ, path),
        (SCORERS, partial(_in_scorers, path=path)),
        (CODE, partial(_in_code, path=path)),
        (MIXED, lambda text: path(text) if _is_file(text, folder) else text),
    ]
    content = dict(content)
    for table, rewrite in kinds:
        for section, keys in table.items():
            block = content.get(section)
            if isinstance(block, dict):
                content[section] = block | {key: rewrite(block[key]) for key in keys if isinstance(block.get(key), str)}
    return content


def _is_file(text: str, folder: Path) -> bool:
    """Tell a file of prompts from a prompt."""
    found = places.find(text, folder) if len(text) < 1024 and "\n" not in text else None
    return found is not None and found.is_file()


def _in_scorers(text: str, path: Rewrite) -> str:
    """Rewrite the paths of "pickscore=FOLDER,my_judges.py:Brightness"."""
    parts = []
    for part in text.split(","):
        name, sign, place = part.strip().partition("=")
        parts.append(_in_code(name, path) + sign + (path(place, files=True) if place else ""))
    return ",".join(parts)


def _in_code(text: str, path: Rewrite) -> str:
    """Rewrite the path of "my_losses.py:ChiPO"; names and modules stay."""
    file, sign, name = text.rpartition(":")
    return path(file) + sign + name if file.endswith(".py") else text
