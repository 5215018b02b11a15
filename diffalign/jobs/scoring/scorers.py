"""What `--with pickscore,hpsv2.1,oracle` stands for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reward_models
from diffalign.errors import ConfigError, UserError, suggestion
from diffalign.jobs.devices import pick_device
from diffalign.places import find, looks_local
from diffalign.shapes.oracle import Oracle

ORACLE = Oracle.name
IMPLICIT = "implicit"
OWN = (ORACLE, IMPLICIT)  # scorers that are no reward models


def names() -> list[str]:
    """Return the scorers one can name: the reward models, the implicit reward and the oracle of the embedded world."""
    return sorted([*reward_models.names(), *OWN])


def folder(judge: str | None, name: str, what: str) -> Path | None:
    """Return the FOLDER of a judge "name=FOLDER" that is no scorer of pictures; None if another one is named.

    Raises:
        ConfigError: no folder, or several; `what` says of what, and how to get one.
    """
    found, _, place = (judge or "").partition("=")
    if found.strip() != name:
        return None
    if not place or "," in place:
        raise ConfigError(f'rollout.scorer "{judge}" must name one folder of {what}')
    return Path(place)


def parse(wanted: str | Sequence[str]) -> dict[str, str | None]:
    """Return by scorer where its weights are; None for the published ones.

    wanted: names separated by commas, each alone or as name=path, e.g. "oracle,pickscore=assets/tiny-pickscore".

    Raises:
        UserError: an unknown or repeated scorer, a path without a name, or none at all.
    """
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, str | None] = {}
    for part in (part.strip() for entry in entries for part in entry.split(",")):
        if not part:
            continue
        name, sign, path = part.partition("=")
        if name not in names():
            raise UserError(_unknown(name))
        if sign and not path:
            raise UserError(f'"{part}" names no path. Write {name}=FOLDER, or {name} alone for the published weights.')
        if sign and name == ORACLE:
            raise UserError(f"The oracle has no weights: write {ORACLE} alone.")
        if name == IMPLICIT and not path:
            raise UserError(f"The implicit reward is that of a trained model: write {IMPLICIT}=runs/demo.")
        if name in found:
            raise UserError(f'Scorer "{name}" is given twice. Use one set of weights at a time.')
        found[name] = path or None
    if not found:
        raise UserError(f"No scorer is given. Name one of {', '.join(names())}, e.g. --with pickscore,hpsv2.1.")
    return found


def load(wanted: str | Sequence[str], device: str = "auto", dtype: torch.dtype = torch.float32) -> list[Any]:
    """Load the scorers in the order given.

    Raises:
        UserError: as `parse`, and for weights that are missing or broken.
    """
    places = parse(wanted)
    where = pick_device(device)
    loaded: list[Any] = []
    for name, path in places.items():
        if name == ORACLE:
            loaded.append(Oracle())
            continue
        if name == IMPLICIT:
            from diffalign.jobs.scoring.implicit import ImplicitReward  # a diffusion model: slow to import

            loaded.append(ImplicitReward(path, str(where), str(dtype).removeprefix("torch.")))
            continue
        try:
            loaded.append(reward_models.load(name, path and _located(name, path), where, dtype))
        except reward_models.ScorerError as error:
            fix = "" if path else f" With weights of your own, write {name}=PATH."
            raise UserError(f"Cannot load {name}: {error}{fix}") from error
    return loaded


def _located(name: str, path: str) -> str:
    """Return where weights are; the hub is asked for nothing that is meant as a path of this machine."""
    found = find(path)
    if found is None and looks_local(path, files=True):
        raise UserError(f'There is no file or folder "{path}" with weights of {name}. Check the path in {name}={path}.')
    return str(found or path)


def _unknown(name: str) -> str:
    available = names()
    if "/" in name or name.startswith("."):
        return f'"{name}" is a path: say whose weights it holds, e.g. pickscore={name}.'
    return f'Unknown scorer "{name}".{suggestion(name, available)} Available: {", ".join(available)}.'
