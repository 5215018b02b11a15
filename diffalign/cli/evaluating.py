"""The commands that compare models: evaluate, arena."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options

MODELS_HELP = (
    "A hub id, folder, .safetensors file, LoRA or training run, or a folder drawn by `diffalign generate`; or, without "
    "--prompts, folders of pictures of your own with equal file names. dpo=runs/demo names it dpo."
)
PROMPTS_HELP = (
    "embedded, a list of prompts (.txt or a table), or a published set: PartiPrompts.tsv, HPDv2's folder of .json, "
    "GenEval's .jsonl, DPG's folder or .csv, Pick-a-Pic's parquet. KIND=PATH says which: parti=, hpdv2=, geneval=, "
    "dpg=, pickapic=. Left out, all MODELs are folders of pictures, compared as they are."
)
JUDGE_HELP = (
    "Of --protocol geneval and dpg: oracle (the embedded world), or a detector or answerer of your own, MODULE:NAME or "
    "FILE.py:NAME."
)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who says how good a picture is."""

    scorers: options.Scorers = None
    protocol: Annotated[str | None, typer.Option(help="A benchmark's rules: geneval, dpg or hps.")] = None
    judge: Annotated[str, typer.Option(help=JUDGE_HELP)] = "oracle"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the models are compared with."""

    baseline: Annotated[str | None, typer.Option(help="Which model the others are compared with: the first.")] = None
    base: options.Base = None
    show_base: Annotated[bool, typer.Option("--show-base", help="Add the base of the first LoRA, in front.")] = False


@options.grouped
def evaluate(
    *,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODELS_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for pictures, scores, summaries and reports.")],
    prompts: Annotated[str | None, typer.Option(help=PROMPTS_HELP)] = None,
    judges: Judges,
    seeds: Annotated[str, typer.Option(help="Pictures of every prompt: 0, 0,3,7 or 0-3 (both ends included).")] = "0",
    noise: Annotated[str, typer.Option(help="own: every prompt draws from other noise; shared: as generate.")] = "own",
    limit: options.Limit = None,
    compared: Compared,
    sampling: options.Sampling,
    size: options.Size,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap over prompts.")] = 10_000,
    gallery: Annotated[int, typer.Option(help="Pairs of pictures a report shows at most.")] = 96,
    machine: options.Machine,
) -> None:
    """Compare models on a prompt set: the same noise for all, all scorers, paired statistics over prompts, a report.

    Writes images/, scores.parquet, summary.json, .csv and .md, categories.csv and report.html (with a page for each
    further model). Run again, the command draws only what is missing.

    Example: `diffalign evaluate runs/dpo runs/mapo --show-base --prompts embedded --with oracle --out out/tiny`

    Example: `diffalign evaluate sdxl-base=... runs/dpo --prompts PartiPrompts.tsv --with pickscore,hpsv2.1 --out out/p`

    Example: `diffalign evaluate mine/before mine/after --with pickscore --out out/mine`

    Example: `diffalign evaluate runs/dpo --show-base --prompts embedded --protocol geneval --seeds 0-3 --out out/g`
    """
    from diffalign.evaluation.results import Bootstrap
    from diffalign.jobs.drawing.prompt_sets import open_prompt_set
    from diffalign.jobs.drawing.prompts import parse_seeds
    from diffalign.jobs.evaluating import evaluate as job
    from diffalign.jobs.scoring.own_pictures import compared_as_they_are

    console, own = Console(), None
    if prompts is None:
        prompt_set, own = compared_as_they_are(models, out, limit, console)
    else:
        prompt_set = open_prompt_set(prompts, limit)
    request = job.Request(
        specs=models,
        own=own,
        prompts=prompt_set,
        seeds=parse_seeds(seeds),
        out=out,
        settings=sampling.settings(size),
        noise=noise,
        bootstrap=Bootstrap(resamples=resamples),
        gallery_size=gallery,
        **vars(judges) | {"scorers": judges.scorers or []},
        **vars(compared),
        **machine.arguments,
    )
    job.evaluate(request, command=shlex.join(["diffalign", *sys.argv[1:]]), console=console)


def arena(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="scores.parquet of `diffalign evaluate`.")],
    scorer: Annotated[str | None, typer.Option(help="Who votes, if several scored.")] = None,
    k: Annotated[int, typer.Option(help="Models a vote.")] = 4,
    votes: Annotated[int, typer.Option(help="At most.")] = 200,
    settled: Annotated[float, typer.Option(help="Stop when every sigma is below this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the prompts drawn.")] = 0,
) -> None:
    """Rank many models from few votes over k of them at a time (K-Sort Arena), a scorer voting.

    Ratings are Gaussian; every vote is between the model seen least and those of like skill it has rarely met. With
    people instead of a scorer: `diffalign label --rank 4`.

    Example: `diffalign arena out/tiny/scores.parquet --scorer oracle --k 3`
    """
    from diffalign.jobs.evaluating.arena import arena as run

    run(scores, scorer=scorer, k=k, votes=votes, settled=settled, seed=seed, console=Console())


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (evaluate, arena):
        app.command()(command)
