"""One run of the comparison: train a method, count what it cost, draw and score held-out prompts.

An example is a pair, an image or a list; of a method that samples while it trains a transition, or a drawn picture.

A run is a process of its own (`python -m benchmarks.method_runs NAME OUTPUT SETTING=VALUE ...`): the peak of memory is
that of one method. It leaves a row in OUTPUT/row.json, with a fingerprint of what it depends on.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.fingerprints import differences, fingerprint_of
from benchmarks.network_counts import NetworkCounts
from diffalign import config as configuration
from diffalign.backbones import loading
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.families import denoiser_of
from diffalign.config import Config
from diffalign.errors import ModelError
from diffalign.evaluation import Manifest, generate_to, prompt_plan, with_negative_branch
from diffalign.evaluation.manifest import atomic_write
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training.train import train
from diffalign.jobs.world.demo import N_PROMPTS, SAMPLING, compare
from diffalign.training import checkpoints, metrics
from diffalign.training.trainer import NonFiniteLoss

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs"
PROMPTS = ROOT / "assets" / "prompts" / "tiny-held-out.txt"
IMAGES_PER_PROMPT, SEED = 2, 3_000_000
STEPS = 200  # of methods that learn from data, half of the recipes' own: of 16 pairs, or as many images
ROW = "row.json"


def row_of(name: str, output: Path, overrides: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Return the row of a run with its scores; see `attempt`.

    Raises:
        SystemExit: the run failed; what it printed stands above.
    """
    row = attempt(name, output, overrides, **options)
    if "failed" in row:
        raise SystemExit(f"The run {output} failed: {row['failed']}")
    return row


def attempt(
    name: str,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    tuning: bool = False,
    shared: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Return the row of a run; train and judge in a process of its own unless there is one of this world already.

    A run that was killed starts again, and so does one whose row has another fingerprint. If the loss or the pictures
    stopped being finite, the row says so under "failed", and has no scores.

    Args:
        name: of a recipe in configs/tiny, or with the folder another one: "tiny-sd3/dpo".
        output: the run's folder.
        overrides: what it sets differently from its recipe, KEY=VALUE.
        tuning: judge on the held-out prompts that no table shows.
        shared: where runs keep what they have in common, latents and the base's pictures; by default beside `output`.
        threads: of the process; by default as many as torch likes.

    Raises:
        SystemExit: the run ended without a row.
    """
    shared = shared or output.parent
    row, different = read_row(name, output, overrides, tuning=tuning, shared=shared)
    if row is not None and not different:
        return row
    if row is not None:
        print(f"{output} was made with {' and '.join(different)}: run again.", flush=True)
    if any((output / file).exists() for file in (ROW, "config.yaml")):  # a run of ours, finished or not
        shutil.rmtree(output)
    options = ["--shared", str(shared), *["--tuning"] * tuning]
    if failed := launch([name, str(output), *overrides, *options], threads):
        raise SystemExit(f"The run {output} ended with exit code {failed}; what it said stands above.")
    return json.loads((output / ROW).read_text(encoding="utf8"))


def launch(words: Sequence[str], threads: int | None) -> int:
    """Run this module in a process of its own; return its exit code."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", "benchmarks.method_runs", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def read_row(
    name: str, output: Path, overrides: Sequence[str], *, tuning: bool, shared: Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the row that a run left, None without one, and what is not as it was when the row was made."""
    file = output / ROW
    if not file.exists():
        return None, []
    row = json.loads(file.read_text(encoding="utf8"))
    now = fingerprint(recipe(name, output, overrides, shared), tuning, shared)
    return row, differences(row.get("fingerprint"), now)


def fingerprint(config: Config, tuning: bool, shared: Path) -> dict[str, str]:
    """Return hashes of what decides the row of a run."""
    drawn = f"{'after' if tuning else 'first'} {N_PROMPTS}, {IMAGES_PER_PROMPT} each from {SEED}"
    return fingerprint_of(config, PROMPTS, drawn, shared / "digests.sqlite")


def run(name: str, output: Path, overrides: Sequence[str], *, tuning: bool, shared: Path) -> dict[str, Any]:
    """Train a recipe, draw and score, and return the row; see `attempt`."""
    config, counts, started = recipe(name, output, overrides, shared), NetworkCounts(), time.perf_counter()
    known = fingerprint(config, tuning, shared)  # before anything is read: files may change under a long run
    row: dict[str, Any] = {"method": name, "changes": list(overrides), "tuning": tuning, "fingerprint": known}
    try:
        with counts.counting():
            train(config, Console(quiet=True))
        row |= costs(config, counts, time.perf_counter() - started)
        row |= judge(config, output, tuning, shared / "images" / f"base-{known['base model']}-{known['judges']}")
    except NonFiniteLoss as error:
        row["failed"] = str(error)
    except ModelError as error:
        if "train_seconds" not in row:  # no model to train, not one that was ruined
            raise
        row["failed"] = str(error)
    if tuning:
        for folder in checkpoints.folders(output):  # there are many trials, and nobody looks at theirs
            shutil.rmtree(folder)
    return row | {"seconds": time.perf_counter() - started}


def costs(config: Config, counts: NetworkCounts, seconds: float) -> dict[str, Any]:
    """Return what a finished training took."""
    lines = metrics.read(Path(config.train.output_dir) / "metrics.jsonl")
    examples = config.train.max_train_steps * config.train.train_batch_size * config.train.gradient_accumulation_steps
    rate = examples / seconds if config.is_online else statistics.median(line["pairs_per_second"] for line in lines)
    return {
        "examples": examples,
        "pairs": examples * pairs_per_example(config, counts.with_gradient / examples),
        "images_with_gradient": counts.with_gradient / examples,
        "images_without_gradient": counts.without / examples,
        "decoded": counts.decoded / examples,
        "examples_per_second": rate,
        "train_seconds": seconds,
        "threads": torch.get_num_threads(),
        "peak_memory_gib": lines[-1]["peak_memory_gib"],
        "objective": dict(config.objective),
        "learning_rate": config.optimizer.learning_rate,
        "final": {key: value for key, value in lines[-1].items() if key != "step"},
    }


def pairs_per_example(config: Config, predicted: float) -> float:
    """Return how many pairs of given images an example holds; of what is drawn while training, examples are counted.

    predicted: images that pass through the policy per example, which is the length of a list.
    """
    layout, winner = config.entry.layout, config.entry.chosen_only
    return {"single": 1.0 if winner else 0.5, "list": predicted / 2}.get(layout, 1.0)


def recipe(name: str, output: Path, overrides: Sequence[str], shared: Path) -> Config:
    """Return the method's recipe for this comparison: with `STEPS` steps, of online methods with its own number."""
    own = read_recipe(name)
    return configuration.change(
        own,
        [
            f"train.output_dir={output}",
            f"data.cache_dir={shared / 'cache'}",
            "logging.report_to=[]",
            *([] if own.is_online else [f"train.max_train_steps={STEPS}"]),
            *overrides,
        ],
    )


def read_recipe(name: str) -> Config:
    """Return a method's recipe as it is: of configs/tiny, or with the folder another one."""
    return configuration.load(RECIPES / (f"{name}.yaml" if "/" in name else f"tiny/{name}.yaml"))


def judge(config: Config, output: Path, tuning: bool, base_images: Path) -> dict[str, Any]:
    """Draw held-out prompts with base and aligned model, and compare them by every scorer."""
    prompts = read_prompts(PROMPTS)
    chosen = prompts[N_PROMPTS:] if tuning else prompts[:N_PROMPTS]
    plan = prompt_plan(chosen, IMAGES_PER_PROMPT, SEED)
    base = draw(config, None, "base", base_images, plan)
    aligned = draw(config, output, output.name, output / "images", plan)
    comparison = compare(base, aligned)
    comparison.write(output, {})
    return {
        "scores": {
            scorer: {
                "base": result.base,
                "aligned": result.aligned,
                "win_rate": result.win_rate,
                "low": result.ci_low,
                "high": result.ci_high,
                "gain_low": result.difference_low,
                "gain_high": result.difference_high,
            }
            for scorer, result in comparison.results.items()
        }
    }


def draw(config: Config, weights: Path | None, name: str, folder: Path, plan: tuple[Any, Any, Any]) -> Manifest:
    """Draw with the base, the base with trained weights, or (NPO) the base with those in the negative branch."""
    ids, texts, seeds = plan
    source = config.model.pretrained_model_name_or_path
    backbone = loading.load(source)
    pipeline, identity = backbone.pipeline(), f"{name} {backbone.denoiser_fingerprint()}"
    if weights is not None and config.objective_name == "npo":
        pipeline, identity = with_negative_branch(pipeline, weights), f"{identity} with the negative branch {weights}"
    elif weights is not None:
        pipeline = load_adapter_into(pipeline, weights)
        backbone.denoiser = denoiser_of(pipeline)
        identity = f"{name} {backbone.denoiser_fingerprint()}"
    return generate_to(folder, pipeline, texts, seeds, SAMPLING, identity=identity, prompt_ids=ids, progress=False)


def main(words: Sequence[str] | None = None) -> None:
    """Run one method and write its row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_runs", description=__doc__)
    parser.add_argument("name", help="of a recipe in configs/tiny, or with the folder another one")
    parser.add_argument("output", type=Path, help="the run's folder")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    parser.add_argument("--shared", type=Path, help="for latents and the base's pictures; by default beside OUTPUT")
    parser.add_argument("--tuning", action="store_true", help="judge on the held-out prompts that no table shows")
    asked = parser.parse_args(words)
    shared = asked.shared or asked.output.parent
    row = run(asked.name, asked.output, asked.overrides, tuning=asked.tuning, shared=shared)
    with atomic_write(asked.output / ROW) as file:
        file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
