"""The commands for human votes: label, and rollout, which draws what a run is to be told about."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options
from diffalign.cli.settings import ConfigFile, Overrides, WithSettings
from diffalign.errors import UserError

FOLDERS_HELP = (
    "Folders drawn by `diffalign generate`, or folders of pictures with equal file names, as they are or as "
    "name=FOLDER; one drawn folder with several seeds of each prompt; or one source of pairs (parquet, .jsonl, w/ and "
    "l/, a hub data set)."
)


def label(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER]...", help=FOLDERS_HELP),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank so many pictures at a time, each by another model.")] = None,
    split: options.PairSplit = "train",
    limit: options.PairLimit = None,
    root: options.Root = None,
    votes: Annotated[Path, typer.Option(help="The SQLite file of votes; made if missing.")] = Path("votes.sqlite"),
    host: Annotated[str, typer.Option(help="Where to listen. 0.0.0.0 lets others on the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    export: Annotated[
        Path | None, typer.Option(help="Instead: write the votes as training pairs into this .parquet file.")
    ] = None,
    layout: Annotated[
        str, typer.Option("--as", help="Of --export: majority, share, votes or lists (of --rank).")
    ] = "majority",
    results: Annotated[bool, typer.Option("--results", help="Instead: print win rates and agreement.")] = False,
) -> None:
    """Let people choose between two pictures, or rank several, in a browser, not knowing which model drew them.

    Sides are random; a tie is an answer; arrow keys vote, 1, 2, ... rank, z zooms, and u goes back. Every rater judges
    under a name of their own and may stop and go on at any time. The server listens on this machine only, and a vote
    survives a crash. What a picture of your own should show stands in a .txt beside it, in captions.json or
    metadata.jsonl, or is its file name.

    Example: `diffalign label out/base out/dpo --votes votes.sqlite`

    Example: `diffalign label out/base out/dpo out/mapo out/inpo --rank 4 --votes votes.sqlite`

    Example: `diffalign label mine/before mine/after --votes votes.sqlite`

    Example: `diffalign generate runs/dpo --prompts p.txt --seeds 0-1 --out drawn && diffalign label drawn`

    Example: `diffalign label --votes votes.sqlite --results --export data/human/train.parquet`
    """
    from diffalign.jobs import label as job
    from diffalign.jobs import votes as said

    console = Console()
    if (export or results) and (folders or rank):
        raise UserError("--export and --results read votes that are there: leave out the folders and --rank.")
    if results:
        said.results(votes, console)
    if export:
        said.export(votes, export, layout, console)
    if not export and not results:
        wanted = job.Wanted(places=folders or [], rank=rank, split=split, limit=limit, root=root)
        job.label(wanted, votes, host=host, port=port, console=console)


def rollout(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="Folder for the pictures; votes.sqlite goes there too.")],
    overrides: Overrides = None,
) -> None:
    """Draw the pictures of a D3PO run's trajectories for people to judge, several of each prompt.

    Then collect votes with `diffalign label`, and train with rollout.scorer=labels=OUT: the run draws the same
    trajectories again. data.max_train_samples says how many prompts. Run again, it goes on where it was interrupted.

    Example: `diffalign rollout configs/tiny/d3po.yaml --out out/people data.max_train_samples=32`

    Example: `diffalign label out/people/picture-1 out/people/picture-2 --votes out/people/votes.sqlite`
    """
    from diffalign import config as configuration
    from diffalign.jobs.training.rollout import rollout as run

    run(configuration.load(config, overrides), out, Console())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(label)
    app.command(cls=WithSettings)(rollout)
