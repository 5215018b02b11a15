"""`--prompts SET` of the commands that evaluate: the embedded set, a published one, or any list of prompts."""

from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import DataError
from diffalign.evaluation.prompt_sets import READERS, PromptSet, read_prompt_set
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.places import local
from diffalign.shapes.captions import parse

EMBEDDED = "embedded"
EMBEDDED_FILE = Path("assets/prompts/tiny-held-out.txt")


def open_prompt_set(wanted: str, limit: int | None = None) -> PromptSet:
    """Return the set that `wanted` names.

    Args:
        wanted: "embedded", KIND=PATH (such as parti=PartiPrompts.tsv), or a path: a published set is known by its
            columns, any other file is read as a list of prompts. Captions of the embedded world have their categories.
        limit: only the first so many prompts.

    Raises:
        DataError: there is nothing of the kind, or it cannot be read.
    """
    kind, sign, place = wanted.partition("=")
    if wanted == EMBEDDED:
        found = _list(local(EMBEDDED_FILE))
    elif sign and not Path(wanted).exists():
        found = read_prompt_set(place, kind)
    else:
        file = local(wanted)
        found = _list(file) if file.suffix == ".txt" or not file.exists() else None
        found = found or read_prompt_set(file) or _list(file)
    return found.head(limit)


def _list(path: Path) -> PromptSet:
    if not path.is_file():
        raise DataError(
            f"There is no prompt file or set {path}. Give a .txt with one prompt a line, a table, {EMBEDDED}, or "
            f"KIND=PATH with one of {', '.join(READERS)}."
        )
    return listed(path.stem, read_prompts(path))


def listed(name: str, prompts: Sequence[str]) -> PromptSet:
    """Return a set of these prompts; captions of the embedded world have their categories."""
    try:
        categories = {"category": [parse(prompt).category for prompt in prompts]}
    except DataError:
        categories = None
    return PromptSet.of(name, prompts, categories)
