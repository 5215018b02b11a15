"""What people said to `diffalign label`: win rates and agreement, and training pairs."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console

from diffalign.errors import DataError, UserError
from diffalign.evaluation.arena import Arena
from diffalign.evaluation.manifest import noises_of
from diffalign.evaluation.statistics import binomial_test, holm, paired_bootstrap, wilson_interval
from diffalign.evaluation.verdict import Evidence, p_text
from diffalign.jobs.evaluating import arena
from diffalign.jobs.scoring import tables
from diffalign.labelling import agreement_of, read_votes
from reward_models.pictures import PictureError, whole

Layout = Literal["majority", "share", "votes", "lists"]
LAYOUTS = ("majority", "share", "votes", "lists")


def propose(names: Sequence[str], rankings: pd.DataFrame, k: int) -> list[str]:
    """Return the models that the next ranking tells most about, after the rankings so far."""
    return _rated(names, ((row.models, row.ranks) for row in rankings.itertuples())).next_match(k)


def export(file: Path, out: Path, layout: Layout, console: Console) -> int:
    """Write the votes as training pairs in Pick-a-Pic's columns, and return how many.

    Args:
        file: of votes.
        out: a .parquet file, read by `diffalign train`, `filter` and `score --pairs`.
        layout: "majority": a pair judged, won by whichever more raters chose, a draw being a tie; "share": a pair
            judged, with the share of the raters as a soft label; "votes": a row a vote; "lists": a ranked list a row
            with a column of scores for every rater. Rankings count as votes on every two of their pictures.
        console: is told what was written.
    """
    if out.suffix != ".parquet":
        raise DataError(f'Training pairs are written as parquet, got "{out}". Give a name that ends in .parquet.')
    if layout not in LAYOUTS:
        raise UserError(f'--as must be one of {", ".join(LAYOUTS)}, got "{layout}".')
    if layout == "lists":
        return _export_lists(file, out, console)
    judged = _judged(read_votes(file)[0], layout)
    judged["ranking_id"] = pd.factorize(judged["task"])[0] + 1
    rows = list(judged.to_dict("records"))
    noises = _noises(row[name] for row in rows for name in ("file_a", "file_b"))
    per_prompt = pd.Series([row["prompt"] for row in rows]).value_counts()
    written = ((_pair(row, int(per_prompt[row["prompt"]])) | _drawn_from(row, noises)) for row in rows)
    count = tables.write_rows(written, out, f"There is no vote in {file} yet.")
    ties = sum(row["credit"] == 0.5 for row in rows)
    console.print(f"{count} pairs in {out}, {ties} of them ties.", markup=False, highlight=False)
    return count


def results(file: Path, console: Console) -> dict[str, Any]:
    """Return and show who was preferred how often, how sure that is, and how far the raters agree."""
    votes, rankings = read_votes(file)
    if votes.empty:
        raise DataError(f"There is no vote in {file} yet.")
    rows = [_of_models(a, b, part) for (a, b), part in votes.groupby(["model_a", "model_b"], sort=False)]
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value_holm"] = p
        evidence = _evidence(row, len(rows))
        row["verdict"] = evidence.verdict
        row["sentence"] = evidence.sentence("the majority", row["model_b"], row["model_a"])
    ranking = _ranking(votes, rankings)
    table = tables.plain("model", "against", "win rate", "95 % interval", "won/tied/lost", "prompts", "p")
    for r in rows:
        interval = "n/a" if pd.isna(r["ci_low"]) else f"{100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f}%"
        counts = f"{r['wins']}/{r['ties']}/{r['losses']}"
        rate, p = f"{100 * r['win_rate']:.1f}%", p_text(r["p_value_holm"])
        table.add_row(r["model_a"], r["model_b"], rate, interval, counts, str(r["prompts"]), p)
    console.print(table)
    for r in rows:
        told = f"{r['model_a']} and {r['model_b']}: {r['sentence']}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if len(ranking) > 2:
        console.print(arena.show(ranking))
    found = agreement_of(votes)
    shared = f"{found['shared_tasks']} pairs judged by several of {found['raters']} raters"
    equal = f"{100 * found['share_equal']:.1f}% of votes on them equal, " if found["shared_tasks"] else ""
    alpha = "n/a" if pd.isna(found["alpha_nominal"]) else f"{found['alpha_nominal']:.3f}"
    console.print(f"{shared}; {equal}Krippendorff's alpha {alpha}.", markup=False, highlight=False)
    return {"pairs": rows, "ranking": ranking.to_dict("records"), "agreement": found}


def _export_lists(file: Path, out: Path, console: Console) -> int:
    """Write every ranked list with a score of each picture by each rater: k - rank + 1."""
    _, rankings = read_votes(file)
    noises = _noises(picture for files in rankings["files"] for picture in files)
    rows = (
        {
            "caption": part["prompt"].iloc[0],
            "images": [_bytes(picture) for picture in part["files"].iloc[0]],
            "scores": [list(map(float, scores)) for scores in zip(*part["ranks"].map(_scores), strict=True)],
            "models": part["models"].iloc[0],
            "n_votes": len(part),
            **({"noises": [noises[picture] for picture in part["files"].iloc[0]]} if noises else {}),
        }
        for _, part in rankings.groupby("task", sort=True)
    )
    count = tables.write_rows(rows, out, f"There is no ranking in {file} yet: collect some with --rank K.")
    console.print(f"{count} ranked lists in {out}.", markup=False, highlight=False)
    return count


def _noises(files: Iterable[str]) -> dict[str, str]:
    """Return what pictures were drawn from if that is known of all of them, else nothing."""
    named = list(dict.fromkeys(files))
    noises = noises_of(named)
    return dict(zip(named, noises, strict=True)) if all(noises) else {}


def _drawn_from(row: dict[str, Any], noises: dict[str, str]) -> dict[str, str]:
    """Return the columns that say what the two pictures of a row were drawn from."""
    return {"noise_0": noises[row["file_a"]], "noise_1": noises[row["file_b"]]} if noises else {}


def _scores(ranks: Sequence[int]) -> list[int]:
    return [len(ranks) - rank + 1 for rank in ranks]


def _judged(votes: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return the rows to write: credit is P(picture a preferred), n_votes how many said so."""
    if layout == "votes" or votes.empty:
        return votes.assign(n_votes=1)
    grouped = votes.groupby("task", sort=True)
    table = grouped.first().reset_index()
    table["credit"], table["n_votes"] = grouped["credit"].mean().to_numpy(), grouped.size().to_numpy()
    table["rater"] = ""
    if layout == "majority":
        table["credit"] = table["credit"].map(lambda share: 0.5 if share == 0.5 else float(share > 0.5))
    return table


def _pair(row: dict[str, Any], per_prompt: int) -> dict[str, Any]:
    """Return a row in Pick-a-Pic's columns."""
    images = [_bytes(row["file_a"]), _bytes(row["file_b"])]
    uids = [hashlib.sha256(image).hexdigest()[:32] for image in images]
    credit = float(row["credit"])
    best = "tie" if credit == 0.5 else uids[0] if credit > 0.5 else uids[1]
    rater = int.from_bytes(hashlib.sha256(row["rater"].encode()).digest()[:6], "big") if row["rater"] else 0
    return {
        "caption": row["prompt"],
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": credit,
        "label_1": 1.0 - credit,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": best,
        "model_0": row["model_a"],
        "model_1": row["model_b"],
        "are_different": uids[0] != uids[1],
        "has_label": True,
        "ranking_id": row["ranking_id"],
        "user_id": rater,
        "num_example_per_prompt": per_prompt,
        "n_votes": int(row["n_votes"]),
    }


def _bytes(file: str) -> bytes:
    try:
        return whole(file)
    except (OSError, PictureError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read the picture {file} ({why}). Put the pictures back.") from error


def _of_models(a: str, b: str, votes: pd.DataFrame) -> dict[str, Any]:
    """Summarise the votes on two models; interval and test are over prompts, as votes on one are not independent."""
    share = votes.groupby("prompt_id")["credit"].mean()
    wins, losses = int((votes["credit"] == 1).sum()), int((votes["credit"] == 0).sum())
    prompts_won, prompts_lost = int((share > 0.5).sum()), int((share < 0.5).sum())
    interval = paired_bootstrap(share, 1 - share, lambda x, _: x.mean(axis=-1))
    wilson = wilson_interval(float(votes["credit"].sum()), len(votes))
    return {
        "model_a": a,
        "model_b": b,
        "win_rate": float(share.mean()),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "wilson_low": wilson.low,
        "wilson_high": wilson.high,
        "prompts_won": prompts_won,
        "prompts_lost": prompts_lost,
        "wins": wins,
        "ties": len(votes) - wins - losses,
        "losses": losses,
        "votes": len(votes),
        "prompts": len(share),
        "p_value": binomial_test(prompts_won, prompts_won + prompts_lost),
    }


def _evidence(row: dict[str, Any], tests: int) -> Evidence:
    return Evidence(
        lead=row["prompts_won"] - row["prompts_lost"],
        prompts=row["prompts"],
        low=row["ci_low"],
        high=row["ci_high"],
        p_value=row["p_value"],
        p_value_holm=row["p_value_holm"],
        tests=tests,
    )


def _ranking(votes: pd.DataFrame, rankings: pd.DataFrame) -> pd.DataFrame:
    """Return the arena's table after all votes: those on pairs and then whole rankings, in the order they came in."""
    names = list(dict.fromkeys([*votes["model_a"], *votes["model_b"]]))
    pairs = votes[~votes["task"].map(str).str.startswith("list ")]
    ranks = {1.0: [1, 2], 0.5: [1, 1], 0.0: [2, 1]}
    on_two = (((row.model_a, row.model_b), ranks[row.credit]) for row in pairs.itertuples())
    on_k = ((row.models, row.ranks) for row in rankings.itertuples())
    return _rated(names, chain(on_two, on_k)).table()


def _rated(names: Sequence[str], votes: Iterable[tuple[Sequence[str], Sequence[int]]]) -> Arena:
    ring = Arena(names)
    for models_of_vote, ranks in votes:
        ring.vote(models_of_vote, ranks)
    return ring
