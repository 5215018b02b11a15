"""The keys of a configuration in words: docs/configuration.md, and `diffalign show key`."""

import inspect
from collections.abc import Callable, Iterable

from diffalign import objectives
from diffalign.config import spelling
from diffalign.config.config import Config
from diffalign.config.keys import Key, keys, sections
from diffalign.errors import ConfigError

COMMAND = "diffalign show keys > docs/configuration.md"
_HEAD = f"""# Configuration

Every key that a configuration may have. `{COMMAND}` writes this page, from the classes of
the sections and the files of the objectives.

A configuration is a YAML file of sections. On the command line a key is changed by `KEY=VALUE`, without dashes and
spaces; one that is unique among all sections needs no section:

    diffalign train sdxl/dpo objective.beta=2000 learning_rate=1e-6

- `null` clears a key that may be null.
- One value where a list is wanted is a list of one, and text with commas a list of its parts:
  `report_to=tensorboard,wandb`.
- `base: FILE` lays a file over another, section by section, to any depth; another objective replaces that section
  whole, another source of data the one below. Shipped files are named as `diffalign list configs` does.
- Files that are read are looked for from the folder of the configuration that names them, in `KEY=VALUE` from where
  one stands, and then among what ships (`assets/...`). What a run writes (`train.output_dir`, `data.cache_dir`)
  starts where one stands.
- `diffalign show key KEY` tells what is said here of a key, and what the shipped configurations set it to. `diffalign
  list keys` has one line a key, and `diffalign show config FILE` all values of a configuration.
"""
_OF_OBJECTIVES = (
    "`objective.name` is the method. The other keys of the section are the hyperparameters of that method, below; "
    "`diffalign show objective NAME` has its paper and its equation."
)


def page() -> str:
    """Return docs/configuration.md."""
    parts = [_HEAD]
    for section in Config.model_fields:
        about = _OF_OBJECTIVES if section == "objective" else inspect.cleandoc(sections()[section].__doc__)
        parts.append(f"## {section}\n\n{about}\n\n{_table(_of(section))}")
        if section == "objective":
            parts += [_objective(name) for name in objectives.built_in()]
    return "\n".join(parts)


def describe(name: str, set_to: Callable[[Key], Iterable[str]] = lambda key: ()) -> str:
    """Return what there is to know of a key: `train.seed`, `seed`, or all of a section, `train`.

    Args:
        name: with or without its section.
        set_to: returns lines on what configurations set a key to.

    Raises:
        ConfigError: there is no such key.
    """
    found = [key for key in keys() if name in (key.full, key.name, key.section)]
    if not found:
        raise ConfigError(spelling.unknown(name, dict.fromkeys(key.full for key in keys())))
    grouped: dict[str, list[Key]] = {}
    for key in found:
        grouped.setdefault(key.full, []).append(key)
    return "\n\n".join("\n".join(_sheet(full, group, set_to)) for full, group in grouped.items())


def _sheet(full: str, group: list[Key], set_to: Callable[[Key], Iterable[str]]) -> list[str]:
    """Return the lines on one key; a hyperparameter may be that of several objectives."""
    if group[0].objective is None:
        (key,) = group
        default = key.default or "none: it must be given"
        lines = [_row("type", key.type), _row("default", default), _row("meaning", key.meaning)]
    else:
        alike: dict[tuple[str, ...], list[str]] = {}
        for key in group:
            alike.setdefault((key.type, key.default, key.meaning), []).append(key.objective)
        lines = [
            f"  of {', '.join(owners)}: {kind}, {default} by default\n    {meaning}"
            for (kind, default, meaning), owners in alike.items()
        ]
    return [full, *lines, *(_row("" if number else "set to", line) for number, line in enumerate(set_to(group[0])))]


def _row(title: str, text: str) -> str:
    return f"  {title:<9} {text}"


def _of(section: str) -> list[Key]:
    return [key for key in keys() if key.section == section and key.objective is None]


def _objective(name: str) -> str:
    own, title = [key for key in keys() if key.objective == name], objectives.entry(name).paper.partition("\n")[0]
    return f"### objective.name: {name}\n\n{title}\n\n{_table(own) if own else 'No hyperparameters.' + chr(10)}"


def _table(rows: list[Key]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in rows:
        default = f"`{key.default}`" if key.default else "must be given"
        cells = (f"`{key.name}`", key.type, default, key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
