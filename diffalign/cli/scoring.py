"""The command that scores pictures and pairs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli.pictures import SCORERS_HELP, Device
from diffalign.errors import UserError

PLACES_HELP = "Files, folders, globs, shard-{000..009}.tar, parquet, JSON lines with paths."


def score(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGES]...", help=PLACES_HELP)] = None,
    scorers: Annotated[list[str] | None, typer.Option("--with", help=SCORERS_HELP)] = None,
    out: Annotated[Path, typer.Option(help="The scores: .parquet, .csv or .jsonl.")] = Path("scores.parquet"),
    prompts: Annotated[Path | None, typer.Option(help="One prompt a picture, in the order of their names.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Score preference pairs instead: parquet, .jsonl, w/ and l/, or a hub data set.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the pairs.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many pairs.")] = None,
    tie_rule: Annotated[
        str, typer.Option(help="What equal scores of a pair count as: half, wrong, right, exclude or pickscore.")
    ] = "half",
    tie_threshold: Annotated[float, typer.Option(help="pickscore: |P - (1 - P)| up to which a pair is a tie.")] = 0.0,
    image_column: Annotated[str | None, typer.Option(help="Where parquet and JSON lines have the picture.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Where they have the prompt.")] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="List and leave out broken pictures; this is the default.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first broken picture.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what OUT.parts knows and score everything.")] = False,
    shard: Annotated[str | None, typer.Option(help="2/4: the second of four machines that share OUT's folder.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode; by default what the CPUs give.")] = None,
    batch_size: Annotated[str, typer.Option(help="Pictures at a time, or auto: what fits into memory.")] = "auto",
    device: Device = "auto",
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
    from diffalign.jobs import score as job

    _check(images, pairs, prompts is not None or prompt is not None, split, limit)
    if strict and skip_broken:
        raise UserError("--strict stops at broken pictures and --skip-broken leaves them out: give one of them.")
    if not pairs and (tie_rule, tie_threshold) != ("half", 0.0):
        raise UserError("--tie-rule and --tie-threshold belong to --pairs: leave them out.")
    size = int(batch_size) if batch_size.lstrip("-").isdigit() else batch_size
    options = job.Options(batch_size=size, workers=workers, device=device, strict=strict, fresh=fresh, shard=shard)
    if pairs:
        rule = job.TieRule(tie_rule, tie_threshold)
        job.score_pairs(pairs, out, scorers or [], options, split=split, limit=limit, rule=rule, console=Console())
        return
    columns = {"image_column": image_column, "caption_column": caption_column}
    given = {"prompts_file": prompts, "prompt": prompt}
    job.score_images(images, out, scorers or [], options, **given, **columns, console=Console())


def _check(images, pairs, has_prompts: bool, split: str, limit: int | None) -> None:
    if bool(images) == bool(pairs):
        got = "both" if images else "neither"
        raise UserError(f"Give IMAGES (files, folders, globs) or --pairs SOURCE; got {got}.")
    if pairs and has_prompts:
        raise UserError("Pairs carry their prompts: leave out --prompts and --prompt.")
    if images and (split != "train" or limit is not None):
        raise UserError("--split and --limit belong to --pairs: leave them out, or name fewer IMAGES.")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(score)
