"""The command that chooses pairs: filter."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options

MARGIN_HELP = (
    "signed: negative where the scorer contradicts the label; or absolute, as in FiFA's reconstruction. With 30 % of "
    "the labels wrong the signed one chose pairs that train better: win rate 0.652 against 0.469 (docs/filtering.md)."
)


@dataclass(frozen=True, kw_only=True)
class Components:
    """What the importance of a pair is made from."""

    scores: Annotated[Path | None, typer.Option(help="Scores of the pairs, of `diffalign score --pairs`.")] = None
    scorer: Annotated[
        str | None, typer.Option(help="Score the pairs with this, NAME[=PATH]; or which scorer of --scores.")
    ] = None
    text_quality: Annotated[Path | None, typer.Option(help="Ratings: columns prompt, score[, harmful].")] = None
    text_quality_model: Annotated[
        str | None, typer.Option(help="A language model that rates prompts: folder or hub id.")
    ] = None
    text_encoder: Annotated[str | None, typer.Option(help="A CLIP model for the entropy: folder or hub id.")] = None


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The constants of `ImportanceSettings`."""

    alpha: Annotated[float, typer.Option(help="Weight of the text terms against the margin.")] = 0.5
    gamma: Annotated[float, typer.Option(help="Weight of text entropy against text quality.")] = 0.5
    neighbours: Annotated[int, typer.Option(help="k of the k-th nearest prompt.")] = 1
    epsilon: Annotated[float, typer.Option(help="Added to distances before the logarithm.")] = 1e-6
    quality_scale: Annotated[float, typer.Option(help="Ratings are divided by it.")] = 10.0
    normalise: Annotated[str, typer.Option(help="zscore, minmax or none: of each component.")] = "zscore"
    margin: Annotated[str, typer.Option(help=MARGIN_HELP)] = "signed"
    margin_cap: Annotated[float | None, typer.Option(help="Larger margins count as this much.")] = None
    require_agreement: Annotated[
        bool, typer.Option("--require-agreement", help="Leave out pairs whose label the scorer contradicts.")
    ] = False
    min_text_quality: Annotated[float | None, typer.Option(help="Leave out prompts rated lower.")] = None
    max_per_prompt: Annotated[int | None, typer.Option(help="Pairs of one prompt at most.")] = None


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Which pairs there are to choose from."""

    dedupe: Annotated[bool, typer.Option(help="Keep one of pairs that are judged more than once.")] = True
    validation: Annotated[float, typer.Option(help="Share of the prompts held out, into validation.parquet.")] = 0.0
    seed: Annotated[int, typer.Option(help="Of random, of diverse without scores, and of the validation split.")] = 0
    split: options.PairSplit = "train"
    limit: options.PairLimit = None
    root: options.Root = None
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out broken rows.")] = False


@options.grouped
def filter_pairs(
    *,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Pairs: parquet, .jsonl, w/ and l/, or a hub data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the chosen pairs, their components and the report.")],
    keep: Annotated[str, typer.Option(help="A share of the pairs (0.1) or a number of them (5000).")] = "0.1",
    method: Annotated[str, typer.Option(help="fifa, margin, quality-aware, diverse or random.")] = "fifa",
    components: Components,
    importance: Importance,
    pool: Pool,
    batch_size: Annotated[int, typer.Option(help="Pictures or prompts at a time.")] = 32,
    device: options.Device = "auto",
) -> None:
    """Choose the preference pairs worth training on: FiFA's importance score, or a baseline.

    Writes train.parquet (the chosen pairs, rows as they were), components.parquet, selection.parquet and report.html.
    Run again into the same folder with another --method, --keep or weight, nothing is computed twice: give --scores,
    --text-encoder and so on the first time only.

    Example: `diffalign filter assets/tiny-pairs --out out/fifa --scorer oracle --text-encoder assets/tiny-pickscore`
    """
    from diffalign.filtering import ImportanceSettings, parse_keep
    from diffalign.jobs.scoring import filter as job

    request = job.Request(
        source=data,
        out=out,
        method=method,
        keep=parse_keep(keep),
        settings=ImportanceSettings(**vars(importance)),
        batch_size=batch_size,
        device=device,
        **vars(components),
        **vars(pool),
    )
    job.filter_pairs(request, command=shlex.join(["diffalign", *sys.argv[1:]]), console=Console())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("filter")(filter_pairs)
