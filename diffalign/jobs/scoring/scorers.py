"""What `--with pickscore,hpsv2.1,oracle` stands for, and `--with my_judges.py:Brightness`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reward_models
from diffalign import plugins
from diffalign.errors import ConfigError, UserError, suggestion
from diffalign.filtering.files import weights_identity
from diffalign.jobs.devices import pick_device
from diffalign.jobs.scoring import plugged
from diffalign.places import find, looks_local
from diffalign.shapes.oracle import Oracle
from reward_models.composite import read_recipe, recipe_file, resolved

ORACLE = Oracle.name
IMPLICIT = "implicit"
OWN = (ORACLE, IMPLICIT)  # scorers that are no reward models


def built_in() -> list[str]:
    """Return the scorers that are here: the reward models, the implicit reward and the oracle of the embedded world."""
    return sorted([*reward_models.names(), *OWN])


def names() -> list[str]:
    """Return the scorers one can name: the built-in ones, then those that installed packages publish."""
    own = built_in()
    return [*own, *(name for name in plugins.published(plugins.SCORERS) if name not in own)]


def plugin(name: str) -> str | None:
    """Return the address of a user's own scorer by its address or published name; None for any other name."""
    return plugins.address(name, plugins.SCORERS, built_in())


def name_of(name: str) -> str:
    """Return what a scorer is called in tables and figures: as it is named, or as a user's own calls itself."""
    address = plugin(name)
    return name if address is None else plugged.name_of(address)


def reads_prompt(name: str) -> bool:
    """Tell whether the scores of a scorer depend on the prompt."""
    address = plugin(name)
    if address is not None:
        return plugged.reads_prompt(address)
    return name in OWN or reward_models.card(name).text_length is not None


def sources(wanted: str | Sequence[str]) -> dict[str, str]:
    """Return by scorer, as `parse` names it, a hash of the code and weights that are a user's own; no built-in ones."""
    found = {name: plugged.source(name, path) for name, path in parse(wanted).items()}
    return {name: source for name, source in found.items() if source}


def weights_of(name: str, path: str | None, memo: Path | None = None) -> str | None:
    """Return what the weights of a scorer are, wherever they lie: hashes of files; None for the published ones.

    name, path: as `parse` returns them. memo: a file that remembers hashes.
    """
    if path is None:
        return None
    places = [located(name, path)]
    if name == plugged.COMPOSITE:
        recipe = recipe_file(places[0])
        places += [resolved(part.path, recipe) or part.name for part in read_recipe(recipe)[1]]
    elif name == IMPLICIT:
        from diffalign.jobs.drawing import models  # slow to import

        places += [model.base.source for model in models.resolve([path])]
    found = [weights_identity(place, memo) for place in places]
    return found[0] if len(found) == 1 else json.dumps(found)


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

    wanted: names separated by commas, each alone or as name=path, e.g. "oracle,pickscore=assets/tiny-pickscore". A
        name may be the address of a user's own scorer: "my_judges.py:Brightness" or "my_judges:Brightness=weights".

    Raises:
        UserError: an unknown or repeated scorer, a path without a name, a user's own that is none, or none at all.
    """
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, str | None] = {}
    for part in (part.strip() for entry in entries for part in entry.split(",")):
        if not part:
            continue
        name, sign, path = part.partition("=")
        if (address := plugin(name)) is not None:
            if (own := plugged.name_of(address)) in built_in():
                raise UserError(
                    f'{address} calls itself "{own}", as a built-in scorer is called: their scores would be mixed up. '
                    "Give it a name of its own."
                )
        elif name not in names():
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
    called = [name_of(name) for name in found]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise UserError(f'Several scorers are called "{twice[0]}": {", ".join(found)}. Use one of them at a time.')
    if not found:
        raise UserError(f"No scorer is given. Name one of {', '.join(names())}, e.g. --with pickscore,hpsv2.1.")
    return found


def load(wanted: str | Sequence[str], device: str = "auto", dtype: torch.dtype = torch.float32) -> list[Any]:
    """Load the scorers in the order given.

    Raises:
        UserError: as `parse`, and for weights that are missing or broken.
    """
    places, where = parse(wanted), pick_device(device)
    return [_load(name, path, where, dtype) for name, path in places.items()]


def _load(name: str, path: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    if name == ORACLE:
        return Oracle()
    if name == IMPLICIT:
        from diffalign.jobs.scoring.implicit import ImplicitReward  # a diffusion model: slow to import

        return ImplicitReward(path, str(device), str(dtype).removeprefix("torch."))
    address = plugin(name)
    try:
        if address is not None:
            return plugged.build(address, path, device, dtype)
        own_parts = {"load": plugged.part} if name == plugged.COMPOSITE else {}
        return reward_models.load(name, path and located(name, path), device, dtype, **own_parts)
    except reward_models.ScorerError as error:
        fix = "" if path else f" With weights of your own, write {name}=PATH."
        raise UserError(f"Cannot load {name}: {error}{fix}") from error


def located(name: str, path: str) -> str:
    """Return where weights are; the hub is asked for nothing that is meant as a path of this machine.

    Raises:
        UserError: there is nothing at such a path.
    """
    found = find(path)
    if found is None and looks_local(path, files=True):
        raise UserError(f'There is no file or folder "{path}" with weights of {name}. Check the path in {name}={path}.')
    return str(found or path)


def _unknown(name: str) -> str:
    available = names()
    if name.endswith(".py"):
        return f'"{name}" is a file: say which class of it, {name}:NAME. See {plugins.PAGE}.'
    if "/" in name or name.startswith("."):
        return f'"{name}" is a path: say whose weights it holds, e.g. pickscore={name}.'
    return f'Unknown scorer "{name}".{suggestion(name, available)} Available: {", ".join(available)}.'
