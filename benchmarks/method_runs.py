"""One method of the comparison: train it, count what it cost, draw and score the held-out prompts.

An example is a pair, an image or a list; of a method that samples while it trains a transition, or a drawn picture.

Run as its own process (`python -m benchmarks.method_runs NAME OUTPUT SETTING=VALUE ...`): the peak of memory is that of
one method.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL
from rich.console import Console

from diffalign import config as configuration
from diffalign import objectives
from diffalign.backbones import loading
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.families import FAMILIES, denoiser_of
from diffalign.config import Config
from diffalign.evaluation import Manifest, SamplingSettings, generate_to, prompt_plan, with_negative_branch
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training.train import train
from diffalign.jobs.world.demo import compare
from diffalign.training import metrics

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "assets" / "prompts" / "tiny-held-out.txt"
N_PROMPTS, IMAGES_PER_PROMPT, SEED = 256, 2, 3_000_000
STEPS = 200  # of methods that learn from data, half of the recipes' own: of 16 pairs, or as many images
ONLINE_LAYOUTS = ("transition", "reward")  # of objectives that sample while they train
SETTINGS = {"lpo": "spo", "tailorpo": "spo"}  # methods that are settings of an objective
TUNING = "--tuning"
SAMPLING = SamplingSettings(num_inference_steps=20, guidance_scale=5.0, batch_size=64)


class Evaluations:
    """Count images that pass through a denoiser, with and without gradient, and latents that are decoded."""

    def __init__(self) -> None:
        self.with_gradient, self.without, self.decoded = 0, 0, 0

    @contextmanager
    def counting(self) -> Any:
        """Count every denoiser and every VAE of this process for the time of the context."""
        with ExitStack() as stack:
            for denoiser in {family.denoiser_class for family in FAMILIES}:
                stack.enter_context(mock.patch.object(denoiser, "forward", self._counted(denoiser.forward)))
            stack.enter_context(mock.patch.object(AutoencoderKL, "decode", self._decoded(AutoencoderKL.decode)))
            yield

    def _counted(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(predict)
        def counted(denoiser: Any, *args: Any, **inputs: Any) -> Any:
            images = len(args[0] if args else inputs.get("hidden_states", inputs.get("sample")))
            if torch.is_grad_enabled():
                self.with_gradient += images
            else:
                self.without += images
            return predict(denoiser, *args, **inputs)

        return counted

    def _decoded(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(decode)
        def counted(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.decoded += len(latents)
            return decode(vae, latents, *args, **kwargs)

        return counted


def run(name: str, output: Path, overrides: list[str], tuning: bool = False) -> dict[str, Any]:
    """Train the recipe of a method, draw and score, and return one row of the table.

    `name` is of configs/tiny, or with the folder another one: "tiny-sd3/dpo".
    """
    config = recipe(name, output, overrides)
    evaluations, started = Evaluations(), time.perf_counter()
    with evaluations.counting():
        train(config, Console(quiet=True), overwrite=True)
    seconds = time.perf_counter() - started
    lines = metrics.read(output / "metrics.jsonl")
    examples = config.train.max_train_steps * config.train.train_batch_size * config.train.gradient_accumulation_steps
    rate = examples / seconds if config.is_online else statistics.median(line["pairs_per_second"] for line in lines)
    row = {
        "method": name,
        "examples": examples,
        "images_with_gradient": evaluations.with_gradient / examples,
        "images_without_gradient": evaluations.without / examples,
        "decoded": evaluations.decoded / examples,
        "examples_per_second": rate,
        "train_seconds": seconds,
        "peak_memory_gib": lines[-1]["peak_memory_gib"],
        "objective": dict(config.objective),
        "learning_rate": config.optimizer.learning_rate,
        "final": {key: value for key, value in lines[-1].items() if key != "step"},
    }
    return row | judge(config, name, output, tuning)


def row_of(name: str, output: Path, overrides: list[str] | None = None, *, tuning: bool = False) -> dict[str, Any]:
    """Return the row of a run in `output`; train and judge in a process of its own unless it is there already.

    With `tuning` it is judged on the held-out prompts that no table shows.
    """
    file = output / "row.json"
    if not file.exists():
        print(f"{output.name} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.method_runs", name, str(output), *(overrides or [])]
        command += [TUNING] * tuning
        subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(file.read_text(encoding="utf8"))


def recipe(name: str, output: Path, overrides: list[str]) -> Config:
    """Return the method's recipe for this comparison: with `STEPS` steps, of online methods with its own number."""
    return configuration.load(
        ROOT / "configs" / (f"{name}.yaml" if "/" in name else f"tiny/{name}.yaml"),
        [
            f"train.output_dir={output}",
            f"data.cache_dir={output.parent / 'cache'}",
            "logging.report_to=[]",
            *([] if is_online(name) else [f"train.max_train_steps={STEPS}"]),
            *overrides,
        ],
    )


def is_online(name: str) -> bool:
    """Tell whether a method learns from what the policy samples while it trains."""
    method = name.rsplit("/", 1)[-1]
    return objectives.objective_class(SETTINGS.get(method, method)).layout in ONLINE_LAYOUTS


def judge(config: Config, name: str, output: Path, tuning: bool) -> dict[str, Any]:
    """Draw held-out prompts with base and aligned model, and compare them by every scorer."""
    prompts, flow = read_prompts(PROMPTS), "/" in name
    chosen = prompts[N_PROMPTS:] if tuning else prompts[:N_PROMPTS]
    ids, texts, seeds = prompt_plan(chosen, 1 if flow else IMAGES_PER_PROMPT, SEED)
    base = draw(config, None, "base", output.parent / "images" / "base", (ids, texts, seeds))
    aligned = draw(config, output, name, output / "images", (ids, texts, seeds))
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


if __name__ == "__main__":
    method, folder, *changes = sys.argv[1:]
    result = run(method, Path(folder), [change for change in changes if change != TUNING], TUNING in changes)
    (Path(folder) / "row.json").write_text(json.dumps(result, indent=1), encoding="utf8")
