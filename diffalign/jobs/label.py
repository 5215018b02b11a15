"""`diffalign label`: people choose between pictures; what they said is read by jobs/votes.py."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from diffalign.errors import DataError, UserError
from diffalign.evaluation import Manifest
from diffalign.jobs import skipped
from diffalign.jobs.scoring import own_pairs
from diffalign.jobs.scoring.own_pictures import Folder, open_folders
from diffalign.jobs.votes import propose
from diffalign.labelling import Rankings, Votes
from diffalign.labelling.app import LOOPBACK, serve
from diffalign.labelling.rankings import MOST, list_tasks
from diffalign.labelling.store import pair_tasks


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Say what people are to judge.

    places: folders drawn by `diffalign generate` or `evaluate`, or folders of pictures with equal names, alone or as
        name=folder; one folder with several seeds of each prompt; or one source of pairs; none to go on with what is
        there.
    rank: k pictures to rank, each by another model; None for two to choose from.
    split: of a source of pairs.
    limit: use only the first so many pairs or lists.
    root: pictures that pairs name, or links in folders lead to, may lie in it too.
    """

    places: Sequence[str] = ()
    rank: int | None = None
    split: str = "train"
    limit: int | None = None
    root: Path | None = None


def label(wanted: Wanted, file: Path, *, host: str, port: int, console: Console) -> None:
    """Add what is wanted to a file of votes, and serve the page until interrupted.

    Args:
        wanted: pictures to judge.
        file: of votes; made if missing.
        host: where to listen.
        port: 0 takes a free one.
        console: is told the address.
    """
    rank = wanted.rank
    if rank is not None and not 3 <= rank <= min(MOST, len(wanted.places) or MOST):
        raise UserError(
            f"--rank takes 3 to {MOST} pictures, no more than there are folders ({len(wanted.places)}); got {rank}."
        )
    added = _tasks(wanted, file, console) if wanted.places else []
    _require_files(task.files if rank else (task.file_a, task.file_b) for task in added)
    with Rankings(file, propose) if rank else Votes(file) as votes:
        new = votes.add(added)
        _, total = votes.progress("")
        what = "lists to rank" if rank else "pairs to judge"
        if not total:
            raise UserError(f"{file} holds no {what}. Name two or more folders of pictures of the same prompts.")
        console.print(f"{total} {what}, {new} of them new; votes go to {file}", markup=False, highlight=False)
        if host not in LOOPBACK:
            console.print(f"Anyone who can reach {host} can vote and see the pictures.", markup=False, highlight=False)
        serve(votes, host, port, _announcer(console))


def _tasks(wanted: Wanted, file: Path, console: Console) -> list[Any]:
    """Return what there is to judge: of folders, or of one source of pairs."""
    kept = file.with_name(f"{file.stem}.pictures")
    if len(wanted.places) == 1 and Folder.of(wanted.places[0]) is None:
        return own_pairs.tasks_of(wanted.places[0], kept, wanted.split, wanted.limit, console, wanted.root)
    named = named_pictures(wanted.places, file.with_name(f"{file.stem}.{skipped.FILE}"), console, wanted.root)
    return (list_tasks(named, wanted.rank) if wanted.rank else pair_tasks(named))[: wanted.limit]


def named_pictures(
    specs: Sequence[str], listed: Path, console: Console, root: Path | None = None
) -> list[tuple[str, pd.DataFrame]]:
    """Return name and pictures (with absolute files) of every folder; all show the same prompts.

    Of one drawn folder every seed counts as a folder of its own. What is left out of folders without manifests is
    listed in the file `listed`. Links may lead to `root`, too.
    """
    folders = [Folder.of(spec) for spec in specs]
    if wrong := next((spec for spec, folder in zip(specs, folders, strict=True) if folder is None), None):
        raise DataError(
            f'"{wrong}" is no folder of pictures. Name folders drawn by `diffalign generate`, folders of pictures with '
            "equal names, or, alone, a source of pairs."
        )
    if len(folders) == 1 and folders[0].has_manifest:
        return _by_seed(folders[0])
    named = [
        (name, manifest.table.assign(file=[str(path.resolve()) for path in manifest.paths]))
        for name, manifest in open_folders(folders, listed, console, root).items()
    ]
    for name, table in named[1:]:
        both = named[0][1].merge(table, on=["prompt_id", "seed"])
        if both.empty or (both["prompt_x"] != both["prompt_y"]).any():
            raise DataError(f"{named[0][0]} and {name} show other prompts or seeds. Draw the same with both.")
    return named


def _by_seed(folder: Folder) -> list[tuple[str, pd.DataFrame]]:
    """Return the pictures of one model as if every seed were a model: they differ in nothing else."""
    manifest = Manifest.read(folder.path)
    table = manifest.table.assign(file=[str(path.resolve()) for path in manifest.paths])
    seeds = [(f"{folder.name}, seed {seed}", part.assign(seed=0)) for seed, part in table.groupby("seed")]
    if len(seeds) < 2:
        raise DataError(
            f"{folder.name} holds one picture of each prompt: nothing to choose between. Name a second folder, or draw "
            "more with `diffalign generate ... --seeds 0-1`."
        )
    return seeds


def _require_files(tasks: Iterable[Sequence[str]]) -> None:
    if gone := next((file for files in tasks for file in files if not Path(file).is_file()), None):
        raise DataError(f"The picture {gone} is not there. Run the command that draws it again.")


def _announcer(console: Console) -> Callable[[str], None]:
    return lambda address: console.print(f"Open {address} (Ctrl-C ends it)", markup=False, highlight=False)
