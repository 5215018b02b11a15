"""`diffalign evaluate --protocol`: benchmarks with rules of their own, judged by any detector or answerer.

geneval   a detector says what is in a picture; the score of a picture is 1 if all that was asked for is there
dpg       a model answers questions; the score of a picture is the share of yes after the dependencies
hps       HPSv2's benchmark: the mean of a style, and its spread over ten groups of prompts

The scores of pictures go through the same paired statistics as those of any scorer; the benchmark's own summary comes
on top of that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from diffalign import plugins
from diffalign.errors import DataError, UserError, suggestion
from diffalign.evaluation import Evaluation, Manifest, dpg, geneval, hps_benchmark
from diffalign.evaluation.manifest import atomic_write
from diffalign.evaluation.prompt_sets import PromptSet
from diffalign.evaluation.scoring import open_image
from diffalign.jobs.scoring import tables
from diffalign.shapes import benchmarks

ORACLE = "oracle"
JUDGED = ("geneval", "dpg")  # by a detector or answerer; these need no scorer
NAMES = (*JUDGED, "hps")
PICTURES = 4  # of a prompt, in both published protocols
PROMPTS = {"geneval": 553, "dpg": 1065}
_ORACLES = {"geneval": benchmarks.ShapesDetector, "dpg": benchmarks.OracleAnswerer}
_METHODS = {"geneval": ("detect", "colours"), "dpg": ("answer",)}


def check(protocol: str, prompts: PromptSet, scorers: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise UserError where the protocol cannot be followed; nothing has been drawn yet."""
    if protocol not in NAMES:
        hint = suggestion(protocol, NAMES)
        raise UserError(f'--protocol must be one of {", ".join(NAMES)}, got "{protocol}".{hint}')
    if protocol == "hps":
        if not any(word.startswith("hpsv2") for scorer in scorers for word in scorer.split(",")):
            raise UserError("--protocol hps is judged by HPSv2: name hpsv2 or hpsv2.1 with --with.")
        if not _is_whole(prompts) or len(seeds) != 1:
            whole = f"{len(hps_benchmark.STYLES)} styles of {hps_benchmark.PROMPTS} prompts, one picture each"
            raise UserError(f"--protocol hps takes {whole}: --prompts hpdv2=FOLDER, one seed, no --limit.")
    else:
        _asked(protocol, prompts)


@dataclass
class Examiner:
    """Judge pictures by a benchmark's rules and keep what was found."""

    protocol: str
    judge: Any  # a `geneval.Detector` or `dpg.Answerer`
    asked: Mapping[int, Any]  # prompt_id -> GenEval's record, or DPG's questions
    found: dict[str, pd.DataFrame] = field(default_factory=dict)  # model -> one row a verdict

    def examine(self, model: str, manifest: Manifest) -> pd.DataFrame:
        """Return a score table of the pictures by this protocol; they are opened one after another."""
        results = [self._judged(row.prompt_id, path) for row, path in self._pictures(manifest)]
        self.found[model] = pd.concat(results, ignore_index=True)
        table = manifest.table[["prompt_id", "prompt", "seed"]]
        column = "correct" if self.protocol == "geneval" else "score"
        scores = [float(result[column].mean()) for result in results]
        return table.assign(model=model, scorer=self.protocol, score=scores)

    def summary(self, model: str) -> dict[str, Any]:
        """Return the benchmark's own numbers of a model."""
        return (geneval if self.protocol == "geneval" else dpg).summarise(self.found[model])

    def _pictures(self, manifest: Manifest):
        return zip(manifest.table.itertuples(), manifest.paths, strict=True)

    def _judged(self, prompt_id: int, path: Path) -> pd.DataFrame:
        picture, asked = open_image(path), self.asked[prompt_id]
        if self.protocol == "geneval":
            return geneval.evaluate([picture], [asked], self.judge)
        return dpg.evaluate({prompt_id: [picture]}, {prompt_id: asked}, self.judge)


def examiner(protocol: str | None, prompts: PromptSet, judge: str) -> Examiner | None:
    """Return what judges by `protocol`; None for one that a scorer judges.

    Args:
        protocol: geneval, dpg, hps or None.
        prompts: with GenEval's records or DPG's questions, or captions of the embedded world.
        judge: "oracle" for the embedded world, or module:Name or file.py:Name of a detector (`geneval.Detector`) or an
            answerer (`dpg.Answerer`): an object, or something that is called without arguments to make one.

    Raises:
        UserError: no such module or name, or it lacks what the protocol calls.
    """
    if protocol not in JUDGED:
        return None
    return Examiner(protocol, _load(judge, protocol), _asked(protocol, prompts))


def write(examined: Examiner | None, seeds: Sequence[int], out: Path, console: Console) -> dict[str, Any]:
    """Show the benchmark's numbers and in what the run differs from it; write them, and all verdicts, as tables."""
    if examined is None:
        return {}
    protocol = examined.protocol
    summaries = {model: examined.summary(model) for model in examined.found}
    level, factor = ("tasks", 100.0) if protocol == "geneval" else ("broad", 1.0)
    kinds = list(next(iter(summaries.values()))[level])
    table = tables.plain("model", "overall", *kinds, title=f"{protocol}, in percent")
    for model, summary in summaries.items():
        numbers = [summary["overall"], *(summary[level][kind] for kind in kinds)]
        table.add_row(model, *(f"{factor * number:.1f}" for number in numbers))
    console.print(table)
    if differs := _differs(examined, seeds):
        console.print(f"Not comparable with published {protocol} numbers: {differs}.", markup=False, highlight=False)
    verdicts = pd.concat([part.assign(model=model) for model, part in examined.found.items()], ignore_index=True)
    with atomic_write(out / f"{protocol}.csv") as file:
        verdicts.to_csv(file, index=False)
    return {protocol: {"models": summaries, "differs": differs}}


def hps(result: Evaluation, prompts: PromptSet, seeds: Sequence[int], out: Path, console: Console) -> dict[str, Any]:
    """Return, show and write HPSv2's benchmark of every model and version of HPSv2, if all prompts were drawn once."""
    judges = [name for name in result.scorers if name.startswith("hpsv2")]
    if not (_is_whole(prompts) and judges and len(seeds) == 1):
        return {}
    scores = result.scores.merge(prompts.table[["prompt_id", "style"]], on="prompt_id")
    rows = [
        part.assign(model=model, scorer=scorer)
        for (model, scorer), own in scores[scores["scorer"].isin(judges)].groupby(["model", "scorer"], sort=False)
        for part in [hps_benchmark.benchmark(own, prompts=hps_benchmark.PROMPTS, styles=hps_benchmark.STYLES)]
    ]
    found = pd.concat(rows, ignore_index=True)[["model", "scorer", "style", "score", "spread", "n"]]
    with atomic_write(out / "hps_benchmark.csv") as file:
        found.to_csv(file, index=False)
    table = tables.plain("model", "scorer", *found["style"].unique(), title="HPSv2's benchmark, x 100")
    for (model, scorer), own in found.groupby(["model", "scorer"], sort=False):
        cells = [f"{r.score:.2f}" + ("" if pd.isna(r.spread) else f" +- {r.spread:.2f}") for r in own.itertuples()]
        table.add_row(model, scorer, *cells)
    console.print(table)
    return {"hps_benchmark": found.to_dict("records")}


def _is_whole(prompts: PromptSet) -> bool:
    return prompts.name == "hpdv2" and len(prompts.table) == len(hps_benchmark.STYLES) * hps_benchmark.PROMPTS


def _asked(protocol: str, prompts: PromptSet) -> dict[int, Any]:
    """Return by prompt_id what the protocol asks; captions of the embedded world tell it themselves."""
    if protocol == "geneval" and prompts.records:
        return dict(enumerate(prompts.records))
    if protocol == "dpg" and prompts.questions:
        return {number: prompts.questions[item] for number, item in enumerate(prompts.items)}
    try:
        if protocol == "geneval":
            return {i: benchmarks.geneval_record(text) for i, text in enumerate(prompts.prompts)}
        asked = [[dpg.Question(**fields) for fields in benchmarks.dpg_questions(text)] for text in prompts.prompts]
    except DataError as error:
        wanted = {"geneval": "geneval=evaluation_metadata.jsonl", "dpg": "dpg=dpg_bench.csv"}[protocol]
        raise UserError(
            f"The prompts of {prompts.name} do not say what {protocol} asks of a picture. Use --prompts {wanted}, or "
            "captions of the embedded world (--prompts embedded)."
        ) from error
    return dict(enumerate(asked))


def _load(judge: str, protocol: str) -> Any:
    if judge == ORACLE:
        return _ORACLES[protocol]()
    if ":" not in judge:
        raise UserError(
            f'--judge is {ORACLE}, MODULE:NAME or FILE.py:NAME, such as my_models.detect:Detector; got "{judge}".'
        )
    plugin = plugins.load(judge)
    made = plugin.value
    if isinstance(made, type) or not all(hasattr(made, method) for method in _METHODS[protocol]):
        with plugins.told(f"{judge} cannot be built", plugin.file.parent):
            made = made()
    if lacking := [method for method in _METHODS[protocol] if not hasattr(made, method)]:
        raise UserError(f'The judge "{judge}" has no {lacking[0]}(), which {protocol} calls. See docs/evaluation.md.')
    return made


def _differs(examined: Examiner, seeds: Sequence[int]) -> str:
    """Return in what a run is another than the published protocol, "" for nothing that is known here."""
    parts = []
    if isinstance(examined.judge, tuple(_ORACLES.values())):
        parts.append("judged by the oracle of the embedded world")
    if len(examined.asked) != PROMPTS[examined.protocol]:
        parts.append(f"{len(examined.asked)} prompts instead of {PROMPTS[examined.protocol]}")
    if len(seeds) != PICTURES:
        parts.append(f"{len(seeds)} picture(s) a prompt instead of {PICTURES}")
    return "; ".join(parts)
