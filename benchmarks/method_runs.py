"""One method of the comparison: train it, count what it cost, draw and score the held-out prompts.

An example is a pair, an image or a list; of a method that samples while it trains a transition, or a drawn picture.

Run as its own process (`python -m benchmarks.method_runs NAME OUTPUT`): the peak of memory is that of one method.
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console

from diffalign import config as configuration
from diffalign import objectives
from diffalign.backbones import loading
from diffalign.backbones.export import load_adapter_into
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
SAMPLING = SamplingSettings(num_inference_steps=20, guidance_scale=5.0, batch_size=64)


class Evaluations:
    """Count images that pass through the denoiser, with and without gradient, and latents that are decoded."""

    def __init__(self) -> None:
        self.with_gradient, self.without, self.decoded = 0, 0, 0

    @contextmanager
    def counting(self) -> Any:
        """Count every UNet and every VAE of this process for the time of the context."""
        predict, decode = UNet2DConditionModel.forward, AutoencoderKL.decode

        def counted_predict(unet: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.with_gradient += len(sample)
            else:
                self.without += len(sample)
            return predict(unet, sample, *args, **kwargs)

        def counted_decode(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.decoded += len(latents)
            return decode(vae, latents, *args, **kwargs)

        UNet2DConditionModel.forward, AutoencoderKL.decode = counted_predict, counted_decode
        try:
            yield
        finally:
            UNet2DConditionModel.forward, AutoencoderKL.decode = predict, decode


def run(name: str, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Train configs/tiny/NAME.yaml, draw and score, and return one row of the table."""
    config = recipe(name, output, overrides)
    evaluations, started = Evaluations(), time.perf_counter()
    with evaluations.counting():
        train(config, Console(quiet=True))
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
    return row | judge(config, name, output)


def row_of(name: str, output: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Return the row of a run in `output`; train and judge in a process of its own unless it is there already."""
    file = output / "row.json"
    if not file.exists():
        print(f"{output.name} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.method_runs", name, str(output), *(overrides or [])]
        subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(file.read_text(encoding="utf8"))


def recipe(name: str, output: Path, overrides: list[str]) -> Config:
    """Return configs/tiny/NAME.yaml for this comparison: with `STEPS` steps, of online methods with its own number."""
    return configuration.load(
        ROOT / "configs" / "tiny" / f"{name}.yaml",
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
    return objectives.objective_class(SETTINGS.get(name, name)).layout in ONLINE_LAYOUTS


def judge(config: Config, name: str, output: Path) -> dict[str, Any]:
    """Draw the held-out prompts with base and aligned model, and compare them by every scorer."""
    ids, texts, seeds = prompt_plan(read_prompts(PROMPTS, N_PROMPTS), IMAGES_PER_PROMPT, SEED)
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
        backbone.denoiser = pipeline.unet
        identity = f"{name} {backbone.denoiser_fingerprint()}"
    return generate_to(folder, pipeline, texts, seeds, SAMPLING, identity=identity, prompt_ids=ids, progress=False)


if __name__ == "__main__":
    method, folder, *changes = sys.argv[1:]
    result = run(method, Path(folder), changes)
    (Path(folder) / "row.json").write_text(json.dumps(result, indent=1), encoding="utf8")
