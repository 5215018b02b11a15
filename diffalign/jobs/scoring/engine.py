"""The pass over pictures: decoded once in worker processes, handed to every scorer that does not know them yet."""

import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from diffalign.errors import DataError
from diffalign.jobs.scoring.decode import Decoder, Prepared
from diffalign.jobs.scoring.items import Item
from diffalign.jobs.scoring.store import Identity, Known
from reward_models.recipes import JoinedRecipe, Recipe

AHEAD = 2  # chunks that each worker prepares in advance: what bounds the memory
CHUNK = 32  # pictures; on a GPU CHUNK_ON_GPU
CHUNK_ON_GPU = 128
FEW = 256  # pictures for which starting workers takes longer than decoding here
MOST_WORKERS = 8
# As DataLoader itself: at once, where a spawned worker imports torch for seconds. Workers touch neither GPU nor OpenMP.
START = "fork" if sys.platform == "linux" else "spawn"


@dataclass(frozen=True)
class Judge:
    """Hold a scorer and what identifies its scores."""

    scorer: Any
    identity: Identity
    recipe: Recipe | JoinedRecipe | None  # None: it takes pictures

    @classmethod
    def of(cls, scorer: Any, source: str | None = None) -> "Judge":
        """Wrap a reward model, or anything with `name` and `score`, such as the oracle.

        source: a hash of what the scores depend on beside what the scorer says: its code, if it is a user's own.
        """
        recipe = getattr(scorer, "recipe", None)
        depends_on = "-".join(filter(None, (getattr(scorer, "identity", None), source))) or "none"
        identity = Identity(scorer.name, depends_on, str(recipe or "rgb"))
        # A recipe of a user's own class might not be found by a spawned worker: such a scorer is handed pictures.
        return cls(scorer, identity, recipe if isinstance(recipe, Recipe | JoinedRecipe) else None)

    def score(self, prepared: Prepared, rows: Sequence[int]) -> np.ndarray:
        """Return the scores [len(rows)] float32. Raises ScorerError or DataError for numbers that are not finite."""
        prompts, images = [prepared.items[row].prompt for row in rows], prepared.of(self.recipe, rows)
        if self.recipe is not None:
            return self.scorer.score_prepared(images, prompts).numpy()
        scores = torch.as_tensor(self.scorer.score(images, prompts)).float().cpu().numpy()
        if scores.shape != (len(rows),) or not np.isfinite(scores).all():
            raise DataError(f'Scorer "{self.identity.scorer}" gave {scores.tolist()[:3]}... for {len(rows)} pictures.')
        return scores


@dataclass(frozen=True)
class Scored:
    """Hold a chunk after all scorers: what was prepared, and by judge the rows it scored and their scores."""

    prepared: Prepared
    scores: list[tuple[np.ndarray, np.ndarray]]


def scan(
    items: Iterable[Item], judges: Sequence[Judge], known: Sequence[Known], *, workers: int = 0, chunk: int = CHUNK
) -> Iterator[Scored]:
    """Yield the items in order, in chunks, scored by every judge that does not know them.

    At most workers * AHEAD chunks are decoded at a time.
    """
    decoder = Decoder(tuple(judge.recipe for judge in judges), tuple(part.keys for part in known))
    parallel = {"multiprocessing_context": START, "prefetch_factor": AHEAD} if workers else {}
    loader = DataLoader(
        decoder,
        sampler=_chunks(items, chunk),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the global one is left alone
        **parallel,
    )
    for prepared in loader:
        scores = []
        for index, judge in enumerate(judges):
            rows = np.flatnonzero(prepared.wanted[:, index])
            values = judge.score(prepared, rows.tolist()) if len(rows) else np.empty(0, np.float32)
            scores.append((rows, values))
        yield Scored(prepared, scores)


@contextmanager
def helpers_alive() -> Iterator[None]:
    """Say in one sentence that a worker was killed.

    torch raises a RuntimeError for it wherever this process is, or the pipe to the worker breaks before.

    Raises:
        DataError: it was.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DataLoader worker" not in str(error) and not _of_a_pipe(error):
            raise
        reason = (str(error).splitlines() or ["its pipe broke"])[0].strip()
        raise DataError(
            f"A process that decodes pictures died ({reason}), perhaps because memory ran "
            "out. What was scored is kept: run the same command again, with fewer --workers (0 starts none)."
        ) from error


def _of_a_pipe(error: BaseException) -> bool:
    """Tell whether an error is of the connection to a process of this machine, not of one that a scorer has."""
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not isinstance(error, RuntimeError) and "multiprocessing" in Path(places[-1]).parts


def pick_workers(asked: int | None, count: int, processes: int = 1) -> int:
    """Return how many processes decode `count` pictures: as asked, else what the CPUs of this machine have to give."""
    if asked is not None:
        return asked
    if count < FEW:
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(cpus // processes - 1, MOST_WORKERS))


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk


def _as_it_is(prepared: Prepared) -> Prepared:
    return prepared
