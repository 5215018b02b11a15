"""The command that says what pictures show: caption."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options
from diffalign.errors import UserError

WITH_HELP = (
    "blip, blip=PATH, model=PATH (a folder or hub id of any image-to-text model of transformers), http://HOST:PORT/v1 "
    "(a server that speaks OpenAI's protocol), shapes (of the embedded world), or prompt (as it is, for --perturb)."
)
TEMPLATE_HELP = (
    "What the captioner is asked; {prompt} stands for the pair's prompt. By default models that chat are shown the "
    "prompt and asked for a sentence; others, such as BLIP, go on where the template ends, by default from nothing."
)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What the captioner is asked."""

    template: Annotated[str | None, typer.Option(help=TEMPLATE_HELP)] = None
    new_tokens: Annotated[int, typer.Option(help="Tokens of a caption at most.")] = 64
    model: Annotated[str | None, typer.Option(help="Of a server: which model; by default the only one it has.")] = None


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How the loser's caption is perturbed."""

    perturb: Annotated[
        str | None, typer.Option(help="Perturb the loser's caption (DCPO-h; DCPO-p with prompt): weak, medium, strong.")
    ] = None
    perturb_with: Annotated[
        str, typer.Option(help="dipper[=PATH], as published (11 billion parameters); http://..., a server; or words.")
    ] = "dipper"
    perturb_model: Annotated[str | None, typer.Option(help="Of that server; by default that of --model.")] = None
    perturb_of: Annotated[str, typer.Option(help="Whose caption the loser gets perturbed: loser or winner.")] = "loser"
    seed: Annotated[int, typer.Option(help="Of dipper and words.")] = 0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server is asked."""

    concurrency: Annotated[int, typer.Option(help="Requests to a server at a time.")] = 8
    retries: Annotated[int, typer.Option(help="How often a failed request is repeated, after 1, 2, 4 ... seconds.")] = 4
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a server that says nothing.")] = 120.0


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which pairs there are."""

    split: options.PairSplit = "train"
    limit: options.PairLimit = None
    root: options.Root = None


@options.grouped
def caption(
    *,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Pairs: parquet, .jsonl, w/ and l/, or a hub data set.")
    ],
    out: Annotated[Path, typer.Option(help="The pairs with their captions: a .parquet file.")],
    captioner: Annotated[str, typer.Option("--with", help=WITH_HELP)],
    asking: Asking,
    perturbation: Perturbation,
    serving: Serving,
    pairs: Pairs,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="List and leave out broken pairs; this is the default.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first pair that is broken or has no caption.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Pictures or texts at a time, on this machine.")] = 8,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Caption both pictures of every pair, for DCPO: into the columns caption_0 and caption_1.

    Writes the pairs in Pick-a-Pic's columns, image 0 the winner, ties left out. Answers are kept in OUT.parts: run
    again after a crash, or with --perturb, the command asks only what is missing and writes the same file. A server
    gets the key in OPENAI_API_KEY, if that is set. Pairs for which it gives no answer are left out, counted and listed.

    Example: `diffalign caption pairs --with blip --out captioned.parquet`

    Example: `diffalign caption pairs --with http://127.0.0.1:8000/v1 --perturb weak --out captioned.parquet`

    Example: `diffalign caption assets/tiny-pairs --with prompt --perturb weak --perturb-with words --out p.parquet`
    """
    from diffalign.jobs.captioning import caption as job
    from diffalign.jobs.captioning.captioners import Request

    if strict and skip_broken:
        raise UserError("--strict stops at broken pairs and --skip-broken leaves them out: give one of them.")
    groups = {**vars(asking), **vars(perturbation), **vars(serving), **vars(pairs)}
    how = {"strict": strict, "batch_size": batch_size, "dtype": dtype, "device": device}
    job.caption_pairs(Request(source=source, out=out, captioner=captioner, **groups, **how), Console())


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(caption)
