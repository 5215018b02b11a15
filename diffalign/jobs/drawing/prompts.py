"""Prompt lists: a text file with one a line, or a table with a prompt column."""

import csv
from pathlib import Path

import pandas as pd

from diffalign.errors import DataError
from diffalign.places import local

COLUMNS = ("prompt", "caption", "Prompt", "text")
_READERS = {
    ".parquet": pd.read_parquet,
    ".csv": pd.read_csv,
    # PartiPrompts as published: prompts hold quotation marks, and one is "null".
    ".tsv": lambda path: pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE),
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".json": pd.read_json,
}


def is_prompt_file(text: str | Path) -> bool:
    """Tell a file of prompts from a prompt: a Path, or text that ends like the name of one."""
    return isinstance(text, Path) or Path(text).suffix in (".txt", *_READERS)


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """Read prompts in order, without empty ones.

    Raises:
        DataError: the file is missing, unreadable, has no prompt column or no prompt.
    """
    path = local(path)
    if not path.is_file():
        raise DataError(f"There is no prompt file {path}. Give a .txt file with one prompt a line, or a table.")
    try:
        if path.suffix in _READERS:
            prompts = _column(_READERS[path.suffix](path), path)
        else:
            prompts = path.read_text(encoding="utf8").splitlines()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"Cannot read prompts from {path}: {error}") from error
    prompts = [text for prompt in prompts if (text := str(prompt).strip())]
    if not prompts:
        raise DataError(f"{path} holds no prompt.")
    return prompts[:limit]


def _column(table: pd.DataFrame, path: Path) -> list[str]:
    for name in COLUMNS:
        if name in table.columns:
            return table[name].dropna().tolist()
    raise DataError(
        f"{path} has no prompt column. It has {', '.join(map(str, table.columns))}; call it prompt or caption."
    )


def parse_seeds(text: str) -> list[int]:
    """Read seeds such as "0", "0,3,7" or "0-3" (both ends included).

    Raises:
        DataError: the text is none of these.

    Example:
        >>> parse_seeds("0-2,7")
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise DataError(f'Seeds are written 0, 0,3,7 or 0-3; got "{text}".')
        seeds += range(int(first), int(last or first) + 1)
    return seeds
