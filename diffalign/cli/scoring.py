"""The command that scores pictures and pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options
from diffalign.errors import UserError

PLACES_HELP = "Files, folders, globs, shard-{000..009}.tar, parquet, JSON lines with paths."


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What pictures show, where they do not say it themselves."""

    prompts: Annotated[Path | None, typer.Option(help="One prompt a picture, in the order of their names.")] = None
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Preference pairs, and how agreement with them is counted."""

    pairs: Annotated[
        str | None, typer.Option(help="Score preference pairs instead: parquet, .jsonl, w/ and l/, or a hub data set.")
    ] = None
    split: options.PairSplit = "train"
    limit: options.PairLimit = None
    tie_rule: Annotated[
        str, typer.Option(help="What equal scores of a pair count as: half, wrong, right, exclude or pickscore.")
    ] = "half"
    tie_threshold: Annotated[float, typer.Option(help="pickscore: |P - (1 - P)| up to which a pair is a tie.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where tables have pictures and prompts, and where the pictures may be."""

    image_column: Annotated[str | None, typer.Option(help="Where parquet and JSON lines have the picture.")] = None
    caption_column: Annotated[str | None, typer.Option(help="Where they have the prompt.")] = None
    root: options.Root = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done."""

    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="List and leave out broken pictures; this is the default.")
    ] = False
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first broken picture.")] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what OUT.parts knows and score everything.")] = False
    shard: Annotated[str | None, typer.Option(help="2/4: the second of four machines that share OUT's folder.")] = None
    workers: Annotated[int | None, typer.Option(help="Processes that decode; by default what the CPUs give.")] = None
    batch_size: Annotated[str, typer.Option(help="Pictures at a time, or auto: what fits into memory.")] = "auto"
    device: options.Device = "auto"

    def settings(self):
        """Return the `Options` of the run."""
        from diffalign.jobs.scoring.score import Options

        given = {key: value for key, value in vars(self).items() if key != "skip_broken"}
        number = self.batch_size.lstrip("-").isdigit()
        return Options(**given | {"batch_size": int(self.batch_size) if number else self.batch_size})


@options.grouped
def score(
    *,
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGES]...", help=PLACES_HELP)] = None,
    scorers: options.Scorers = None,
    out: Annotated[Path, typer.Option(help="The scores: .parquet, .csv or .jsonl.")] = Path("scores.parquet"),
    captions: Captions,
    pairs: Pairs,
    columns: Columns,
    work: Work,
) -> None:
    """Score pictures for their prompts, or preference pairs.

    A folder drawn by `diffalign generate` knows its prompts, tables and tar shards have captions; other pictures need
    --prompts or --prompt. For pairs the table says how often each scorer agrees with people, and with what probability
    it prefers the chosen image. What is scored is kept in OUT.parts: run again after a crash, or with one more scorer,
    the command computes only what is missing. `accelerate launch` shares the pictures among its processes.

    Example: `diffalign score out/base out/dpo --with pickscore,hpsv2.1 --out scores.csv`

    Example: `diffalign score "data/shard-{000..009}.tar" --with pickscore --workers 8`

    Example: `diffalign score --pairs assets/tiny-pairs --with oracle,pickscore=assets/tiny-pickscore`
    """
    from diffalign.jobs.scoring import score as job

    _check(images, captions, pairs, work)
    if pairs.pairs:
        rule = job.TieRule(pairs.tie_rule, pairs.tie_threshold)
        which = {"split": pairs.split, "limit": pairs.limit, "rule": rule, "root": columns.root}
        job.score_pairs(pairs.pairs, out, scorers or [], work.settings(), **which, console=Console())
        return
    given = {"prompts_file": captions.prompts, "prompt": captions.prompt, **vars(columns)}
    job.score_images(images, out, scorers or [], work.settings(), **given, console=Console())


def _check(images: list[str] | None, captions: Captions, pairs: Pairs, work: Work) -> None:
    """Raise UserError for options that contradict each other, or have no effect on what is asked."""
    if bool(images) == bool(pairs.pairs):
        got = "both" if images else "neither"
        raise UserError(f"Give IMAGES (files, folders, globs) or --pairs SOURCE; got {got}.")
    if pairs.pairs and captions != Captions():
        raise UserError("Pairs carry their prompts: leave out --prompts and --prompt.")
    if images and (pairs.split != "train" or pairs.limit is not None):
        raise UserError("--split and --limit belong to --pairs: leave them out, or name fewer IMAGES.")
    if work.strict and work.skip_broken:
        raise UserError("--strict stops at broken pictures and --skip-broken leaves them out: give one of them.")
    if images and (pairs.tie_rule, pairs.tie_threshold) != ("half", 0.0):
        raise UserError("--tie-rule and --tie-threshold belong to --pairs: leave them out.")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(score)
