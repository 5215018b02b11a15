"""`diffalign arena`: rank many models from few votes over k of them at a time; a scorer votes instead of people."""

from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation.arena import Arena
from diffalign.jobs.scoring import tables


def arena(
    table: Path, *, scorer: str | None, k: int, votes: int, settled: float, seed: int, console: Console
) -> pd.DataFrame:
    """Return and show the ranking of the models of a score table (K-Sort Arena, arXiv:2408.14468).

    A vote is about one prompt and seed, drawn at random: `Arena.next_match` names the models, their scores rank them.

    Args:
        table: scores.parquet of `diffalign evaluate`: prompt_id, seed, model, scorer, score.
        scorer: who votes; None if there is only one.
        k: models a vote.
        votes: at most.
        settled: stop when every model's sigma is below it; 0 takes all votes.
        seed: of the prompts drawn and of ties between candidates.
    """
    wide, scorer = _pictures(table, scorer)
    ring = Arena(list(wide.columns), seed=seed)
    if votes < 1:
        raise UserError(f"--votes must be at least 1, got {votes}.")
    random = np.random.default_rng(seed)
    while ring.votes < votes and not (ring.variance < settled**2).all():
        match = ring.next_match(k)
        shown = wide.iloc[int(random.integers(len(wide)))][match]
        ring.vote(match, shown.rank(ascending=False, method="min").astype(int).tolist())
    result = ring.table()
    console.print(show(result))
    possible = len(wide) * len(wide.columns) * (len(wide.columns) - 1) // 2
    said = f"{ring.votes} votes by {scorer} over {k} models; comparing all pictures in pairs would take {possible}."
    console.print(said, markup=False, highlight=False)
    return result


def show(result: pd.DataFrame) -> Table:
    """Return an arena's table for the terminal."""
    table = tables.plain("model", "rank", "skill", "sigma", "skill - 3 sigma", "votes", title="K-Sort Arena")
    for row in result.itertuples():
        numbers = f"{row.mean:.2f}", f"{row.sigma:.2f}", f"{row.score:.2f}"
        table.add_row(row.model, str(row.rank), *numbers, str(row.votes))
    return table


def _pictures(file: Path, scorer: str | None) -> tuple[pd.DataFrame, str]:
    """Return the scores by one scorer, pictures down and models across."""
    if not file.is_file():
        raise DataError(f"There is no score table {file}. `diffalign evaluate ... --out out/x` writes scores.parquet.")
    try:
        scores = pd.read_parquet(file, columns=["prompt_id", "seed", "model", "scorer", "score"])
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a score table of diffalign evaluate ({error}).") from error
    names = list(scores["scorer"].unique())
    if scorer is None and len(names) > 1:
        raise UserError(f"{file} has scores by {', '.join(names)}: say who votes with --scorer.")
    scorer = scorer or names[0]
    if scorer not in names:
        raise UserError(f'{file} has no scores by "{scorer}".{suggestion(scorer, names)} It has {", ".join(names)}.')
    own = scores[scores["scorer"] == scorer]
    wide = own.pivot(index=["prompt_id", "seed"], columns="model", values="score")[list(own["model"].unique())]
    if wide.isna().any(axis=None):
        raise DataError(f"{file}: not every model drew every prompt and seed. Evaluate them in one command.")
    return wide, scorer
