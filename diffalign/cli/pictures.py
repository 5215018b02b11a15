"""Commands that draw pictures: generate, grid."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffalign.cli import options


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is drawn: prompts and seeds."""

    prompts: options.PromptFile = None
    prompt: options.PromptTexts = None
    seeds: options.Seeds = "0"
    limit: options.Limit = None

    def read(self) -> tuple[list[str], list[int]]:
        """Return the prompts and the seeds."""
        from diffalign.jobs.drawing.generate import read_request

        return read_request(self.prompts, self.prompt, self.seeds, self.limit)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What stands side by side in a grid."""

    base: options.Base = None
    show_base: Annotated[bool, typer.Option("--show-base", help="Add the base of the first LoRA or UNet.")] = False
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Columns are the checkpoints of the runs.")] = False
    sweep: Annotated[
        str | None, typer.Option(help="Columns are guidance_scale=1,3,5, steps=... or lora_scale=0,1.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a grid looks."""

    title: Annotated[str, typer.Option(help="Set above the figure.")] = ""
    cell: Annotated[int | None, typer.Option(help="Side of a picture in pixels, 64 or more.")] = None
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light"
    font: Annotated[Path | None, typer.Option(help="A TrueType file, for scripts that DejaVu Sans lacks.")] = None

    def look(self, subtitle: str):
        """Return the `Look` of the pages."""
        from diffalign.evaluation import Look

        return Look(**vars(self) | {"font": str(self.font) if self.font else None}, subtitle=subtitle)


@options.grouped
def generate(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their manifest.")],
    asked: Asked,
    base: options.Base = None,
    sampling: options.Sampling,
    negative: options.NegativeBranch,
    size: options.Size,
    machine: options.Machine,
) -> None:
    """Draw prompts into a folder: lossless PNG files and a manifest that says which shows what.

    Every picture has its own generator, so it can be drawn again alone. Run again, the command goes on where it was
    interrupted; a longer prompt list or more seeds extend the folder.

    Example: `diffalign generate runs/demo --prompts assets/prompts/tiny-held-out.txt --seeds 0-3 --out out/demo`

    Example: `diffalign generate runs/dpo --negative-lora runs/npo --prompt "a red circle" --out out/dpo-npo`
    """
    from diffalign.jobs.drawing import generate as job

    prompts, seeds = asked.read()
    what = {"base": base, "negative": negative.network()}
    job.generate(model, prompts, seeds, out, sampling.settings(size), **what, **machine.arguments, console=Console())


@options.grouped
def grid(
    *,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=options.MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The figure: .png, .jpg, .webp or .pdf.")] = Path("grid.png"),
    asked: Asked,
    scorers: options.Scorers = None,
    columns: Columns,
    style: Style,
    sampling: options.Sampling,
    negative: options.NegativeBranch,
    size: options.Size,
    machine: options.Machine,
) -> None:
    """Draw one figure: prompts and seeds down, models across, from the same noise, with scores below each picture.

    LoRAs and UNets of one base model load it once. --negative-lora holds for all columns. A figure of many rows is
    written in pages: of one PDF, or grid-1.png, grid-2.png, ...

    Example: `diffalign grid runs/dpo runs/mapo --show-base --prompt "a red circle" --seeds 0-3 --with pickscore`

    Example: `diffalign grid runs/dpo --checkpoints --prompts p.txt --out grid.pdf`

    Example: `diffalign grid runs/dpo --sweep guidance_scale=1,3,5,7.5 --prompt "a red circle"`
    """
    from diffalign.jobs.drawing import grid as job
    from diffalign.jobs.scoring import scorers as scoring
    from diffalign.jobs.scoring import tables

    prompts, seeds = asked.read()
    settings, network, console = sampling.settings(size), negative.network(), Console()
    what = {"negative": network, **vars(columns), **machine.arguments}
    if scorers:
        scoring.parse(scorers)  # a misspelt one is told before anything is loaded
        what["load_judges"] = partial(scoring.load, scorers, machine.device)
    look = style.look(job.subtitle(settings, columns.sweep, network))
    scores = job.grid(models, prompts, seeds, out, settings, look=look, **what, console=console)
    if scores is not None:
        console.print(tables.means(scores))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (generate, grid):
        app.command()(command)
