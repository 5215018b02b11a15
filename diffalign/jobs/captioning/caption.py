"""`diffalign caption`: what the two pictures of every pair show, as DCPO trains on it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from diffalign.captioning import Answers, Captioner, Missing, Question, ask
from diffalign.data import PairRow, PairSource, RowError, open_pairs
from diffalign.errors import DataError
from diffalign.evaluation.manifest import atomic_write
from diffalign.filtering import writing
from diffalign.folder_lock import held
from diffalign.jobs import skipped
from diffalign.jobs.captioning.captioners import PROMPT, Request, captioner_of, perturber_of
from diffalign.progress import progress_bar

COLUMNS = ("caption_0", "caption_1")
MADE_BY = b"diffalign.captions"  # metadata of the parquet file
KEPT = "answers.sqlite"


def caption_pairs(request: Request, console: Console) -> int:
    """Write the pairs in Pick-a-Pic's columns, image 0 the winner, with a caption of each image; return how many.

    Answers are kept in OUT.parts: the command that was killed goes on, and writes what it would have written. Pairs
    with a broken picture or without an answer are left out, counted and listed.

    Raises:
        UserError: unusable data, no such captioner, a server that is not there, or no pair left.
    """
    how = {"on_error": "raise" if request.strict else "skip", "root": request.root}
    how["error_log"] = request.out.with_name(f"{request.out.stem}.{skipped.FILE}")
    with held(request.parts), skipped.skippable():
        source = open_pairs(request.source, split=request.split, max_samples=request.limit, **how)
        if source.images_per_example != 2:
            raise DataError(f"{request.source} holds lists or single images; only pairs are captioned.")
        captioner, perturber = captioner_of(request), perturber_of(request)
        with Answers(request.parts / KEPT) as known:
            work = _Work(request, source, captioner, perturber, known)
            written = work.write()
    skipped.tell(source.rejects, console)
    _tell(work, written, console)
    return written


@dataclass
class _Work:
    """Caption a source, a row group at a time."""

    request: Request
    source: PairSource
    captioner: Captioner | None  # None: the prompt is the caption
    perturber: Captioner | None
    known: Answers

    def __post_init__(self):
        self.equal, self.sample = 0, None  # pairs with one caption for both; a pair with its captions

    def write(self) -> int:
        fields = [*writing.schema_of(self.source), *(pa.field(name, pa.string()) for name in COLUMNS)]
        made_by = {"captions": getattr(self.captioner, "asked", PROMPT), "of": self.request.perturb_of}
        made_by |= {"perturbed": self.perturber.asked} if self.perturber else {}
        schema = pa.schema(fields, {MADE_BY: json.dumps(made_by).encode()})
        rows, written = iter(self.source), 0
        total = len(self.source) * self._per_pair
        with atomic_write(self.request.out) as temporary, progress_bar(total, "Captioning", True) as advance:
            with pq.ParquetWriter(temporary, schema) as writer:
                while part := list(islice(rows, writing.ROWS)):
                    records = self._records(part, advance)
                    writer.write_table(pa.Table.from_pylist(records, schema=schema))
                    written += len(records)
            if not written:
                raise DataError(f"{self.request.source}: no pair got its captions: {self.source.counts}.")
        return written

    @property
    def _sides(self) -> int:
        """Return how many pictures of a pair are captioned."""
        return 0 if self.captioner is None else 1 if self.perturber and self.request.perturb_of == "winner" else 2

    @property
    def _per_pair(self) -> int:
        return self._sides + (self.perturber is not None)

    def _records(self, rows: Sequence[PairRow], advance: Callable[[int], None]) -> list[dict[str, Any]]:
        """Return the records of the pairs that have all they need."""
        found = [(row, record) for row in rows if (record := writing.whole(self.source, row))]
        advance((len(rows) - len(found)) * self._per_pair)
        captions = self._captions([row for row, _ in found], advance)
        records = []
        for (row, record), both in zip(found, self._perturbed(captions, advance), strict=True):
            fault = next((text.reason for text in both if isinstance(text, Missing)), None)
            if fault is not None:
                self.source.rejects.add(RowError(row.chosen.place, "no caption", f"no caption was given ({fault})"))
                continue
            records.append(record | dict(zip(COLUMNS, both, strict=True)))
            self.equal += both[0] == both[1]
            self.sample = self.sample or (row.prompt, *both)
        return records

    def _captions(self, rows: Sequence[PairRow], advance: Callable[[int], None]) -> list[list[str | Missing]]:
        """Return the captions of the winner, and of the loser where they are asked for."""
        if self.captioner is None:
            return [[row.prompt, row.prompt] for row in rows]
        prompts = [row.prompt if self.captioner.reads_prompt else "" for row in rows]
        sides = [row.images[: self._sides] for row in rows]
        questions = [Question(p, image) for p, images in zip(prompts, sides, strict=True) for image in images]
        answers = iter(ask(self.captioner, questions, self.known, advance))
        return [list(islice(answers, self._sides)) for _ in rows]

    def _perturbed(
        self, captions: list[list[str | Missing]], advance: Callable[[int], None]
    ) -> list[tuple[str | Missing, str | Missing]]:
        """Return both captions of every pair, the loser's perturbed if that is wanted."""
        if self.perturber is None:
            return [(chosen, rejected) for chosen, rejected in captions]
        texts = [both[0] if self.request.perturb_of == "winner" else both[-1] for both in captions]
        questions = [Question(text) for text in texts if isinstance(text, str)]
        advance(len(texts) - len(questions))
        answers = iter(ask(self.perturber, questions, self.known, advance))
        changed = [next(answers) if isinstance(text, str) else text for text in texts]
        return [(both[0], text) for both, text in zip(captions, changed, strict=True)]


def _tell(work: _Work, written: int, console: Console) -> None:
    request, counts = work.request, work.source.rejects.counts
    say: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    if missing := counts.skipped.get("no caption"):
        console.print(f"{missing} pairs have no caption: run the same command again to ask for them again.", **say)
    if work.equal:
        skipped.say(
            f"{work.equal} of {written} pairs have one caption for both pictures: for DCPO, DPO's pairs.", console
        )
    prompt, chosen, rejected = work.sample
    console.print(f"prompt  {prompt}\nwinner  {chosen}\nloser   {rejected}", **say)
    console.print(
        f"{written} pairs in {request.out}. Train on them with data.train_data_dir={request.out} "
        f"data.image_caption_columns=[{','.join(COLUMNS)}]",
        **say,
    )
