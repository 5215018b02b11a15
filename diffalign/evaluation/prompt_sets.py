"""The prompt sets that papers evaluate on, read from their files as published, with the categories they come in.

kind        files                                                           categories
pickapic    test_unique-*.parquet (or validation_unique): column caption    none
parti       PartiPrompts.tsv: Prompt, Category, Challenge, Note             category, challenge
hpdv2       a folder with anime.json, concept-art.json, paintings.json,
            photo.json (or one of them): lists of strings                   style
geneval     evaluation_metadata.jsonl: tag, include, exclude, prompt        tag
dpg         a folder of ITEM.txt, or dpg_bench.csv: item_id, text, ...      source (what ITEM's name begins with)
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.tables import captions, json_records, read_columns, read_json
from diffalign.errors import DataError, suggestion
from diffalign.evaluation.dpg import Question
from diffalign.evaluation.hps_benchmark import STYLES
from diffalign.text_files import read_lines, read_text


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Hold prompts in their published order, and what else their file says of them."""

    name: str
    table: pd.DataFrame  # prompt_id (the position), prompt, and the columns named in `categories`
    categories: tuple[str, ...] = ()
    records: Sequence[dict[str, Any]] = ()  # GenEval: the lines, one a prompt, as `geneval.judge` takes them
    items: Sequence[str] = ()  # DPG: the id of every prompt
    questions: dict[str, list[Question]] = field(default_factory=dict)  # DPG: item -> questions, as `dpg.evaluate` does

    @classmethod
    def of(
        cls, name: str, prompts: Sequence[str], categories: dict[str, Sequence[str]] | None = None, **more: Any
    ) -> Self:
        """Make a set of prompts and their categories, one a prompt; raise DataError if a prompt is empty."""
        prompts = [str(prompt).strip() for prompt in prompts]
        if not prompts:
            raise DataError(f"The prompt set {name} holds no prompt.")
        if not all(prompts):
            raise DataError(f"Prompt {prompts.index('')} of {name} is empty. Write what the picture shows.")
        columns = {key: list(map(str, values)) for key, values in (categories or {}).items()}
        table = pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, **columns})
        return cls(name, table, tuple(columns), **more)

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        return self.table["prompt"].tolist()

    def head(self, limit: int | None) -> Self:
        """Return the set of the first prompts; with a category, of the first so many of the whole file all the same."""
        if limit is None or limit >= len(self.table):
            return self
        if limit < 1:
            raise DataError(f"A prompt set needs at least 1 prompt, got a limit of {limit}.")
        items = self.items[:limit]
        questions = {item: self.questions[item] for item in items if item in self.questions}
        return type(self)(self.name, self.table.head(limit), self.categories, self.records[:limit], items, questions)


def read_prompt_set(path: str | Path, kind: str | None = None) -> PromptSet | None:
    """Read a published set; None if `kind` is not given and the files look like none of them.

    Raises:
        DataError: nothing there, an unknown kind, or files that are not as published.
    """
    path = Path(path).expanduser()
    if kind is not None and kind not in READERS:
        raise DataError(f'Unknown prompt set "{kind}".{suggestion(kind, READERS)} Known: {", ".join(READERS)}.')
    if not path.exists():
        raise DataError(f"There is no prompt file or folder {path}.")
    try:
        kind = kind or _detect(path)
        return READERS[kind](path) if kind else None
    except (KeyError, TypeError, ValueError, OSError, UnicodeDecodeError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        what = f"not {kind} as published" if kind else "no readable set of prompts"
        raise DataError(f"{path} is {what} ({error}). See docs/evaluation.md.") from error


def _pickapic(path: Path) -> PromptSet:
    """Every caption once, in the order of its first row: the *_unique splits have one row a caption anyway."""
    files = _ending(path, ".parquet") if path.is_dir() else [path]
    tables = ((file, pq.read_table(file, columns=["caption"]).to_pandas()) for file in files)
    found = [caption for file, table in tables for caption in captions(table, "caption", file)]
    return PromptSet.of("pickapic", list(dict.fromkeys(found)))


def _parti(path: Path) -> PromptSet:
    """Fields hold quotation marks and words such as "null" and "42": everything is text, nothing is quoted."""
    table = read_columns(path)
    categories = {"category": table["Category"].tolist(), "challenge": table["Challenge"].tolist()}
    return PromptSet.of("parti", table["Prompt"].tolist(), categories)


def _hpdv2(path: Path) -> PromptSet:
    files = [path / f"{style}.json" for style in STYLES] if path.is_dir() else [path]
    prompts: list[str] = []
    styles: list[str] = []
    for file in files:
        content = read_json(file)
        if not isinstance(content, list) or not all(isinstance(prompt, str) for prompt in content):
            raise DataError(f"{file} should be a JSON list of prompts.")
        prompts += content
        styles += [file.stem] * len(content)
    return PromptSet.of("hpdv2", prompts, {"style": styles})


def _geneval(path: Path) -> PromptSet:
    records = [record for _, record in json_records(path)]
    tags = [record["tag"] for record in records]
    if any("include" not in record for record in records):
        raise DataError(f"{path} has a line without include: expected GenEval's evaluation_metadata.jsonl.")
    return PromptSet.of("geneval", [record["prompt"] for record in records], {"tag": tags}, records=records)


def _dpg(path: Path) -> PromptSet:
    if path.is_dir():
        files = _ending(path, ".txt")
        items, texts, questions = [f.stem for f in files], [read_text(f) for f in files], {}
    else:
        table = read_columns(path)
        first = table.drop_duplicates("item_id")
        items, texts = first["item_id"].tolist(), first["text"].tolist()
        questions = {str(item): _questions(rows) for item, rows in table.groupby("item_id", sort=False)}
    sources = [re.match(r"[A-Za-z_]*", item)[0].rstrip("_") or "other" for item in items]
    return PromptSet.of("dpg", texts, {"source": sources}, items=items, questions=questions)


def _questions(rows: pd.DataFrame) -> list[Question]:
    """Return the questions of one prompt; the category is what its tuple begins with, e.g. "entity - whole"."""
    return [
        Question(
            id=int(row.proposition_id),
            text=row.question_natural_language,
            parents=tuple(int(parent) for parent in str(row.dependency).split(",") if int(parent) != 0),
            category=row.tuple.split("(")[0].strip(),
        )
        for row in rows.itertuples(index=False, name="Row")
    ]


READERS: dict[str, Callable[[Path], PromptSet]] = {
    "pickapic": _pickapic,
    "parti": _parti,
    "hpdv2": _hpdv2,
    "geneval": _geneval,
    "dpg": _dpg,
}


def _detect(path: Path) -> str | None:
    """Return which set the files are, by names and columns; None if they are of none."""
    if path.is_dir():
        if all((path / f"{style}.json").is_file() for style in STYLES):
            return "hpdv2"
        return "dpg" if _ending(path, ".txt") else "pickapic" if _ending(path, ".parquet") else None
    suffix = path.suffix.lower()
    if suffix == ".json":
        return "hpdv2" if path.stem in STYLES else None
    if suffix == ".parquet":
        names = set(pq.read_schema(path).names)
        return "pickapic" if {"caption", "label_0"} <= names else None
    if suffix in (".tsv", ".csv", ".jsonl"):
        head = next(iter(read_lines(path)), "")
        marks = {".tsv": ("Prompt\t", "Challenge"), ".csv": ("item_id", "proposition_id"), ".jsonl": ("tag", "include")}
        kinds = {".tsv": "parti", ".csv": "dpg", ".jsonl": "geneval"}
        return kinds[suffix] if all(mark in head for mark in marks[suffix]) else None
    return None


def _ending(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder with an ending, in capitals or not; hidden ones are none of them."""
    files = (file for file in sorted(folder.iterdir()) if file.suffix.lower() == suffix and file.is_file())
    return [file for file in files if not file.name.startswith(".")]
