"""The right spelling of settings that were written in another way: `--learning_rate 1e-5`, `lr=1e-5`, `rank: 4`."""

import re
from collections.abc import Iterable, Sequence

from diffalign.config.config import Config
from diffalign.config.keys import Key, keys
from diffalign.config.synonyms import SYNONYMS
from diffalign.errors import ConfigError, suggestion

PLACEHOLDER = "VALUE"
_NUMBER = re.compile(r"[-+]?\.?\d")


def unknown(key: str, known: Iterable[str], objective: str | None = None) -> str:
    """Return what to say of a key that is none of `known` (section.key): which one was meant.

    objective: the one that is configured, where another's hyperparameter may be meant.
    """
    section, _, leaf = key.rpartition(".")
    known = list(known)
    text = f'Unknown key "{key}".'
    if meant := SYNONYMS.get(_plain(leaf)):
        if meant.key in known or meant.key.startswith("objective."):
            name = meant.key if meant.value is None else f"{meant.key}={meant.value}"
            return f'{text} Did you mean "{_within(section, name)}"?{_note(meant.note)}'
    if not section and leaf in Config.model_fields:
        return f"{text} It is a section: write {leaf}.KEY=VALUE."
    others = [found.objective for found in keys() if found.objective and found.name == leaf]
    if others and objective and section in ("", "objective"):
        return f'{text} It is a hyperparameter of {", ".join(others)}; the objective here is "{objective}".'
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    everywhere = {name.rpartition(".")[2]: name for name in known}
    plain = _plain(leaf)
    near = siblings.get(plain) or everywhere.get(plain) or _near(leaf, siblings) or _near(leaf, everywhere)
    return f'{text} Did you mean "{_within(section, near)}"?' if near else text


def could_be(key: str, owner: str) -> str | None:
    """Return the key that a bare `key` more often means than that of the section `owner`, or None."""
    meant = SYNONYMS.get(key)
    return meant.key if meant and owner != "objective" and meant.key != f"{owner}.{key}" else None


def without_dashes(word: str, following: Sequence[str]) -> tuple[str, int, str] | None:
    """Return `--learning_rate` as a setting, with the value that follows.

    Args:
        word: an option, with its value if that is written with "=".
        following: the arguments after it.

    Returns:
        The setting `learning_rate=1e-5`, how many of the arguments after it belong to it, and a note or ""; None if no
        key is meant.

    Raises:
        ConfigError: keys of several sections could be meant.
    """
    name, equals, value = word.partition("=")
    if not (found := _meant(name)):
        return None
    written, fixed, key, note = found
    if equals:
        return f"{written}={fixed or value}", 0, note
    taken = following[:1] if following and _is_value(following[0], key, fixed) else []
    empty = "true" if key.is_switch else PLACEHOLDER
    return f"{written}={fixed or (taken[0] if taken else empty)}", len(taken), note


def with_equals(words: Sequence[str]) -> list[str] | None:
    """Return `rank: 4`, `rank 4` and `rank = 4` among settings as `rank=4`; None if nothing is written so."""
    joined, index = [], 0
    while index < len(words):
        word = words[index]
        index += 1
        head, colon, rest = word.partition(": ")
        if colon and _meant(head):
            joined.append(f"{_meant(head)[0]}={rest.strip()}")
        elif "=" not in (head := word.rstrip(":=")) and _goes_on(words[index:]) and (found := _meant(head)):
            value = words[index].lstrip("=:")
            index += 1
            if not value and index < len(words):  # "rank", "=", "4"
                value, index = words[index], index + 1
            joined.append(f"{found[0]}={value}")
        else:
            joined.append(word)
    return joined if joined != list(words) else None


def _goes_on(words: Sequence[str]) -> bool:
    """Tell whether a value follows a key: a word without an equals sign, or with one in front."""
    return bool(words) and (words[0][:1] in "=:" or "=" not in words[0])


def _meant(name: str) -> tuple[str, str | None, Key, str] | None:
    """Return how the key is written that `name` means, the value that it says, the key, and a note."""
    section, _, leaf = _plain(name).rpartition(".")
    by_name: dict[str, Key] = {}
    for key in keys():
        if key.name == leaf and section in ("", key.section):
            by_name.setdefault(key.full, key)
    meant = SYNONYMS.get(leaf)
    if meant and (not by_name or could_be(leaf, next(iter(by_name.values())).section)):
        (key, *_) = (key for key in keys() if key.full == meant.key)
        return _shortest(key), meant.value, key, meant.note
    if len(by_name) > 1 and not section:
        raise ConfigError(f'"{leaf}" exists in several sections: write {" or ".join(f"{key}=..." for key in by_name)}.')
    if not by_name:
        return None
    (key, *_) = by_name.values()
    return key.full if section else _shortest(key), None, key, ""


def _shortest(key: Key) -> str:
    """Return the name without its section, unless another section or another objective may have it."""
    if key.section == "objective" or could_be(key.name, key.section):
        return key.full
    return key.full if len({other.full for other in keys() if other.name == key.name}) > 1 else key.name


def _is_value(word: str, key: Key, fixed: str | None) -> bool:
    if (word.startswith("-") and not _NUMBER.match(word)) or "=" in word:
        return False
    if fixed and _NUMBER.match(word):
        return True
    if key.is_switch or fixed:  # a flag elsewhere: what follows belongs to it only if it says so
        return word.lower() in ("true", "false") or word in key.type.removeprefix("one of ").split(", ")
    return True


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").lower()


def _within(section: str, name: str) -> str:
    """Return the name as one writes it in `section`."""
    return name.removeprefix(f"{section}.")


def _near(leaf: str, names: dict[str, str]) -> str | None:
    hint = suggestion(leaf, names)
    return next((full for name, full in names.items() if f'"{name}"' in hint), None)


def _note(note: str) -> str:
    return f" {note}" if note else ""
