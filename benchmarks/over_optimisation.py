"""What a run was trained on against the oracle, checkpoint by checkpoint: where more reward stops meaning more.

`python -m benchmarks over-optimisation RUN...` draws held-out prompts with the base and with every checkpoint of each
run, from the same noise, and scores them with the run's own reward model (the first, if it has several) and with the
oracle. The prompts are those that recipes may be tuned on, not those of the table of methods: what is seen here may
decide when to stop.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor

from benchmarks.method_runs import PROMPTS, ROOT
from diffalign import config as configuration
from diffalign.config import Config
from diffalign.evaluation import Manifest, generate_to, prompt_plan
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.scoring import scorers
from diffalign.jobs.world.demo import N_PROMPTS, SAMPLING
from diffalign.shapes.oracle import Oracle
from diffalign.training import checkpoints

RESULTS = ROOT / "benchmarks" / "results"
DRAWN, SEED = 64, 5_000_000


@dataclass(frozen=True, kw_only=True)
class Change:
    """Hold what a checkpoint's pictures score above the base's, per prompt: mean and standard error of the mean."""

    mean: float
    error: float
    base: float  # mean score of the base's pictures
    spread: float  # standard deviation of the base's scores over pictures, the unit of the plot

    @classmethod
    def of(cls, base: Tensor, drawn: Tensor) -> "Change":
        """Compare scores [N] of the same prompts and noise."""
        gain = drawn - base
        error = gain.std().item() / math.sqrt(len(gain))
        return cls(mean=gain.mean().item(), error=error, base=base.mean().item(), spread=base.std().item())


def main(runs: list[Path], output: Path, count: int = DRAWN) -> None:
    """Judge every checkpoint of the runs; write over-optimisation.json and .png.

    Raises:
        SystemExit: a run without checkpoints, or one that was trained on no reward.
    """
    curves = []
    for run in runs:
        curves.append(curve(run, output, count))
        print(json.dumps(curves[-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "over-optimisation.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf8")
    plot(curves, RESULTS / "over-optimisation.png")


def curve(run: Path, output: Path, count: int) -> dict[str, Any]:
    """Return the changes of one run's scorer and of the oracle by step."""
    config = configuration.load(run / "config.yaml")
    found = checkpoints.folders(run)
    if not config.is_online or not found:
        raise SystemExit(
            f"{run} is no run with a reward and checkpoints: {config.objective_name}, {len(found)} checkpoint(s). Name "
            "runs of spo, d3po, ddpo, refl, draft or alignprop."
        )
    loader = models.ModelLoader("float32", "cpu")
    named = [models.base_of(models.resolve([str(found[0])])[0]), *models.resolve([str(path) for path in found])]
    judges = {"scorer": scorers.load(config.rollout.scorer, "cpu")[0], "oracle": Oracle()}
    folders = [output / "base", *(output / run.name / path.name for path in found)]
    drawn = [draw(loader.load(model), folder, count) for model, folder in zip(named, folders, strict=True)]
    points = []
    for name, judge in judges.items():
        base, *later = (judge.score(opened(manifest), manifest.prompts) for manifest in drawn)
        points.append({name: [asdict(Change.of(base, scores)) for scores in later]})
    steps = [int(path.name.rpartition("-")[2]) for path in found]
    return {**summary(config, run), "prompts": count, "steps": steps, **points[0], **points[1]}


def summary(config: Config, run: Path) -> dict[str, Any]:
    """Return what a curve is of."""
    return {
        "run": run.name,
        "objective": config.objective_name,
        "trained_on": next(iter(scorers.parse(config.rollout.scorer))),
        "learning_rate": config.optimizer.learning_rate,
        "batch": config.train.global_batch_size or config.train.train_batch_size,
    }


def draw(model: models.LoadedModel, folder: Path, count: int) -> Manifest:
    """Draw the prompts once each; pictures that are there already are taken."""
    prompts = read_prompts(PROMPTS)[N_PROMPTS : N_PROMPTS + count]
    ids, texts, seeds = prompt_plan(prompts, 1, SEED)
    with torch.no_grad():
        return generate_to(
            folder, model.pipeline, texts, seeds, SAMPLING, identity=model.identity, prompt_ids=ids, progress=False
        )


def opened(manifest: Manifest) -> list[Image.Image]:
    """Return the pictures of a folder."""
    return [Image.open(path).convert("RGB") for path in manifest.paths]


def plot(curves: list[dict[str, Any]], file: Path) -> None:
    """Draw both scores over training, in standard deviations of the base's pictures, one panel a run."""
    figure, panels = plt.subplots(
        1, len(curves), figsize=(3.4 * len(curves), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, found in zip(panels[0], curves, strict=True):
        labels = {"scorer": f"{found['trained_on']} (trained on)", "oracle": "oracle"}
        for name, colour in (("scorer", "#c0392b"), ("oracle", "#1f3a5f")):
            changes = [{"mean": 0.0, "error": 0.0, "spread": 1.0}, *found[name]]
            mean = [change["mean"] / change["spread"] for change in changes]
            error = [1.96 * change["error"] / change["spread"] for change in changes]
            axes.errorbar([0, *found["steps"]], mean, error, color=colour, marker="o", ms=3, label=labels[name])
        axes.axhline(0, color="#808080", lw=0.8, ls="--")
        axes.set_title(found["run"], fontsize=9)
        axes.set_xlabel("optimizer steps")
        axes.legend(loc="lower right", frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("gain over the base (its std)")
    figure.savefig(file, dpi=150)
    plt.close(figure)
