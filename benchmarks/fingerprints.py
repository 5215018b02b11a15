"""What a run of the comparison depends on, as short hashes: rows of another world are told from those of this one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from diffalign import config as configuration
from diffalign import places
from diffalign.config import Config
from diffalign.config.paths import READ, WRITTEN
from diffalign.data.fingerprints import digest_bytes, digest_files
from diffalign.jobs.scoring import scorers
from diffalign.jobs.world.demo import SAMPLING, TINY_SCORERS
from diffalign.shapes import captions, oracle, render

ORACLE = tuple(Path(module.__file__) for module in (oracle, render, captions))


def fingerprint_of(config: Config, prompts: Path, drawn: str, memo: Path | None = None) -> dict[str, str]:
    """Return hashes of what decides a run's row.

    Args:
        config: of the run; where it writes does not count.
        prompts: the file whose prompts are drawn.
        drawn: which of them are drawn, in words that change with them.
        memo: remembers hashes of files that stay as they are, as `digest_files` does.
    """
    judges = files_in([*TINY_SCORERS.values(), *ORACLE, prompts])
    settings = configuration.changed(configuration.portable(config))
    for section, keys in WRITTEN.items():
        settings[section] = {key: value for key, value in settings.get(section, {}).items() if key not in keys}
    return {
        "base model": _digest(files_in([config.model.pretrained_model_name_or_path]), memo),
        "training data": _digest(files_in(_named(config)), memo),
        "judges": _digest(judges, memo, drawn, json.dumps(asdict(SAMPLING))),
        "settings": _digest([], memo, json.dumps(settings, sort_keys=True)),
    }


def differences(found: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Return what is not as it was when a row was made, in words; rows of before there were fingerprints say so."""
    if found is None:
        return ["no fingerprint"]
    return [
        f"another {name}" if name == "base model" else f"other {name}" for name in now if found.get(name) != now[name]
    ]


def files_in(named: Iterable[str | Path]) -> list[Path]:
    """Return the files named and those in the folders named; what is not on this machine is left out."""
    found = [places.local(name) for name in named]
    return [
        file
        for path in found
        for file in (sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path])
        if file.is_file()
    ]


def _named(config: Config) -> list[str]:
    """Return what a configuration reads besides its base model: data, prompts, and the weights of its judges."""
    named = [getattr(config.data, key) for key in READ["data"]]
    for wanted in (config.data.scorer, config.rollout.scorer):
        named += scorers.parse(wanted).values() if wanted else []
    return [name for name in named if name]


def _digest(files: list[Path], memo: Path | None, *texts: str) -> str:
    digests = digest_files(files, memo)
    names = [f"{file.parent.name}/{file.name}" for file in files]
    return digest_bytes("\n".join([*names, *digests, *texts]).encode()).hex()[:16]
