"""`diffalign list` and `show`: what there is to use, and what it means."""

import inspect
import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from diffalign import config as configuration
from diffalign import objectives, plugins
from diffalign.config import keys, reference
from diffalign.errors import UserError, suggestion
from diffalign.jobs.sheets import sheet
from diffalign.text_files import read_lines
from diffalign.yaml_text import read_yaml

# What tells of scorers is imported where it is asked for: it takes torch, and so seconds.
VALUES_SHOWN = 6  # of a key, that configurations set it to
KINDS = ("objectives", "scorers", "configs", "keys")


def list_kind(kind: str, console: Console) -> None:
    """Print what there is of a kind, a line each.

    Raises:
        UserError: an unknown kind.
    """
    rows: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "objectives": _objectives,
        "scorers": _scorers,
        "configs": _configs,
        "keys": _keys,
    }
    plural = kind if kind.endswith("s") else f"{kind}s"
    if plural not in rows:
        raise UserError(f'Cannot list "{kind}".{suggestion(kind, KINDS)} Expected {", ".join(KINDS)}.')
    table = sheet()
    for name, line in rows[plural]():
        table.add_row(name, Text(line))
    console.print(table)


def show(kind: str, name: str | None, overrides: list[str], console: Console) -> None:
    """Print one objective, scorer, resolved configuration or key; of keys without a name, the page on all.

    Raises:
        UserError: an unknown kind or name.
    """
    showers: dict[str, Callable[[], str]] = {
        "objective": lambda: describe_objective(name),
        "scorer": lambda: describe_scorer(name),
        "config": lambda: configuration.dump(configuration.load(name, overrides)).rstrip(),
        "key": lambda: reference.describe(name, _set_to) if name else reference.page().rstrip(),
    }
    single = kind.removesuffix("s")
    if single not in showers:
        raise UserError(f'Cannot show "{kind}".{suggestion(kind, showers)} Expected {", ".join(showers)}.')
    if name is None and single != "key":
        raise UserError(f"Say which: diffalign show {single} NAME. `diffalign list {single}s` names them.")
    if overrides and single != "config":
        raise UserError(f'"{overrides[0]}" has no effect: only a config takes KEY=VALUE.')
    console.print(showers[single](), markup=False, highlight=False, emoji=False, soft_wrap=True)


def describe_objective(name: str) -> str:
    """Return paper, equation, hyperparameters with their defaults, and what the objective needs."""
    found = objectives.entry(name)
    lines = [f"  {key} = {known.default!r}" for key, known in found.hyperparameters.items()] or ["  none"]
    needs = "by its hyperparameters" if found.needs is None else ", ".join(sorted(found.needs)) or "nothing"
    kinds = {"pair": "pairs", "transition": "steps that it samples", "reward": "images that it draws"}
    trains_on = "the chosen images of pairs" if found.chosen_only else kinds.get(found.layout, found.layout)
    return "\n".join(
        [
            f"{name}: {found.paper}",
            "",
            found.about,
            "",
            "Hyperparameters (objective.KEY in a config):",
            *lines,
            "",
            f"Frozen passes: {needs}. Trains on: {trains_on}.",
            f"Code: {_relative(found.file)}",
        ]
    )


def describe_scorer(name: str) -> str:
    """Return the card of a scorer: weights, preprocessing, formula, scale, licence, traps."""
    import reward_models
    from diffalign.jobs.scoring import plugged, scorers
    from diffalign.shapes import oracle

    if name == scorers.ORACLE:
        about = inspect.cleandoc(oracle.__doc__)
        return (
            f"{name}: {about}\n\nscale         [0, 1], higher is better\nattributes    {', '.join(oracle.ATTRIBUTES)}"
        )
    if name == scorers.IMPLICIT:
        from diffalign.jobs.scoring.implicit import CARD  # with all of diffusers

        return CARD
    scorers.parse(name)
    if (address := scorers.plugin(name)) is not None:
        return plugged.describe(address)
    card = reward_models.card(name)
    low, high = card.usual_range
    rows = {
        "weights": card.weights,
        "preprocessing": card.preprocessing,
        "prompt length": "not read" if card.text_length is None else f"{card.text_length} tokens, then cut",
        "formula": card.formula,
        "scale": card.scale,
        "usual range": f"{low:g} to {high:g}",
        "licence": card.licence,
        "checked with": card.source,
    }
    traps = [f"  - {trap}" for trap in card.traps]
    return "\n".join([card.name, *(f"{key:<14}{value}" for key, value in rows.items()), "traps", *traps])


def _objectives() -> Iterator[tuple[str, str]]:
    for name in objectives.built_in():
        yield name, objectives.entry(name).paper.partition("\n")[0]
    yield from plugins.listed(plugins.OBJECTIVES, objectives.built_in())


def _scorers() -> Iterator[tuple[str, str]]:
    import reward_models
    from diffalign.jobs.scoring import scorers

    for name in scorers.built_in():
        if name == scorers.ORACLE:
            yield name, "Measures pictures of the embedded world exactly; needs no weights."
        elif name == scorers.IMPLICIT:
            yield name, "DPO's implicit reward of a trained model against its base: implicit=runs/demo."
        else:
            card = reward_models.card(name)
            yield name, f"{card.weights}, {card.scale}, {card.licence}"
    yield from plugins.listed(plugins.SCORERS, scorers.built_in())


def _configs() -> Iterator[tuple[str, str]]:
    for name, file in configuration.shipped_names().items():
        lines = takewhile(lambda line: line.startswith("#"), read_lines(file))
        comment = " ".join(line.lstrip("# ") for line in lines)
        yield name, re.split(r"(?<=[.:]) ", comment)[0].rstrip(".:")


def _keys() -> Iterator[tuple[str, str]]:
    objectives_of: dict[str, list[str]] = {}
    for key in keys.keys():
        if key.objective is None:
            yield key.full, re.split(r"(?<=\.) (?=[A-Z])", key.meaning)[0].rstrip(".")
        else:
            objectives_of.setdefault(key.full, []).append(key.objective)
    for name, owners in objectives_of.items():
        yield name, f"A hyperparameter of {', '.join(owners)}"


def _set_to(key: keys.Key) -> Iterator[str]:
    """Yield what the shipped configurations set a key to: the values set most often, with some of the files."""
    found: dict[str, list[str]] = {}
    for name, file in configuration.shipped_names().items():
        block = (read_yaml(file) or {}).get(key.section)
        if isinstance(block, dict) and key.name in block:
            found.setdefault(keys.value_in_words(block[key.name]), []).append(name)
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))
    for value, files in ranked[:VALUES_SHOWN]:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        yield f"{value} by {', '.join(files[:3])}{more}"
    if len(ranked) > VALUES_SHOWN:
        yield f"{len(ranked) - VALUES_SHOWN} other values"


def _relative(path: Path) -> Path:
    """Return the path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
