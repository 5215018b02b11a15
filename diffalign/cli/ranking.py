"""The command that makes training data of scored pictures: rank."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.errors import UserError


def rank(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `diffalign score FOLDER... --out` wrote.")],
    out: Annotated[Path, typer.Option(help="The training data, a .parquet file.")],
    layout: Annotated[
        str, typer.Option("--as", help="lists (rankdpo, plackett_luce) or pairs (best and worst).")
    ] = "lists",
    k: Annotated[int | None, typer.Option(help="Pictures a list; by default as many as every prompt has.")] = None,
    min_gap: Annotated[float, typer.Option(help="Smallest difference of win rates of a pair, 0 to 1.")] = 0.0,
) -> None:
    """Make ranked lists or pairs of pictures that several scorers have judged (Syn-Pic, RankDPO).

    Example: `diffalign generate base --prompts p.txt --seeds 0-3 --out out/a`, then
    `diffalign score out/a --with pickscore,hpsv2.1 --out scores.parquet`, then
    `diffalign rank scores.parquet --out data/lists/train.parquet`
    """
    from diffalign.jobs.scoring.rank import rank as run

    if layout not in ("lists", "pairs"):
        raise UserError(f'--as must be lists or pairs, got "{layout}".')
    if not 0 <= min_gap <= 1:
        raise UserError(f"--min-gap must be between 0 and 1, got {min_gap}.")
    run(scores, out, layout, k, min_gap, Console())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(rank)
