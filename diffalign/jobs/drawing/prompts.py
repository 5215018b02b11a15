"""Prompt lists: a text file with one a line, or a table with a prompt column."""

from pathlib import Path

import pandas as pd

from diffalign.data import tables
from diffalign.errors import DataError
from diffalign.places import local
from diffalign.text_files import read_lines

COLUMNS = ("prompt", "caption", "text")  # in capitals or not


def is_prompt_file(text: str | Path) -> bool:
    """Tell a file of prompts from a prompt: a Path, or text that ends like the name of one."""
    return isinstance(text, Path) or Path(text).suffix.lower() == ".txt" or tables.is_table(text)


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """Read prompts in order, without empty ones.

    Raises:
        DataError: the file is missing, unreadable, has no prompt column, a prompt that is no text, or no prompt.
    """
    path = local(path)
    if not path.is_file():
        raise DataError(f"There is no prompt file {path}. Give a .txt file with one prompt a line, or a table.")
    try:
        texts = _column(tables.read_columns(path), path) if tables.is_table(path) else read_lines(path)
    except DataError as error:
        raise DataError(f"Cannot read prompts from {path}: {error}") from error
    except OSError as error:
        raise DataError(f"Cannot read prompts from {path}: {error.strerror}.") from error
    prompts = [text for prompt in texts if (text := prompt.strip())]
    if not prompts:
        raise DataError(f"{path} holds no prompt.")
    return prompts[:limit]


def _column(table: pd.DataFrame, path: Path) -> list[str]:
    names = {str(name).strip().lower(): name for name in reversed(table.columns)}
    for name in COLUMNS:
        if name in names:
            return tables.captions(table, names[name], path, "prompt")
    raise DataError(f"It has no prompt column, but {', '.join(map(str, table.columns))}; call it prompt or caption.")


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
