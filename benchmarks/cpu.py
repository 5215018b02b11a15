"""`make bench`: the optimizer step of the embedded SDXL on this CPU, with every option, beside what scripts do.

All variants and the script-style baseline of the same precision run in one process, in turn; quoted are medians over
the rounds of the ratio within a round.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu_step
from benchmarks.cpu_step import Step
from diffalign.training.metrics import peak_memory_gib

ROUNDS, WARM_UP = 12, 2
BF16, CACHED = "mixed_precision=bf16", "reference.cache_draws=1"
VARIANTS: dict[str, list[str]] = {
    "diffalign": [],
    "without fused LoRA": ["fused_lora=false"],
    "without shared text": ["share_text=false"],
    "channels-last": ["channels_last=true"],
    "LoRA in mid and up blocks": ["lora.blocks=[mid,up]"],
    "reference cached": [CACHED],
    "compiled": ["compile=full"],
    "compiled, reference cached": ["compile=full", CACHED],
    "MaPO (no reference)": ["objective.name=mapo"],
    "bf16": [BF16],
    "bf16, under autocast": [BF16, "pure_bf16=false"],
    "bf16, reference cached": [BF16, CACHED],
}
SCALES = {"pairs": [4, 8, 16, 32], "pixels": [32, 64, 128]}


def run(names: list[str] | None = None) -> dict[str, Any]:
    """Measure all variants (or some), the share of the network, scaling, and a run from pictures to weights."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return {
            "what": f"LoRA r{cpu_step.RANK} DPO step, 16 pairs, 64 px, {ROUNDS} rounds interleaved",
            "steps": compare(place, {name: VARIANTS[name] for name in names or VARIANTS}),
            "scaling": scaling(place),
            "end_to_end": end_to_end(place),
        }


def compare(place: Path, variants: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Time every variant, the network alone, and the script-style steps, in turn."""
    takes: dict[str, Step] = {}
    for precision in ([], [BF16]):
        label = "script-style" + (", bf16 autocast" if precision else "")
        takes[label] = cpu_step.script_step(cpu_step.settings(place, *precision))
    takes["network alone"] = cpu_step.network_step(cpu_step.settings(place))
    for name, overrides in variants.items():
        config = cpu_step.settings(place, *overrides)
        if CACHED in overrides:
            cpu_step.fill_caches(config)
        takes[name] = cpu_step.diffalign_step(config)
    times = in_turn(takes)
    network = times["network alone"]
    rows = []
    for name, seconds in times.items():
        half = BF16 in variants.get(name, []) or name.endswith("bf16 autocast")
        baseline = times["script-style, bf16 autocast" if half else "script-style"]
        rows.append(
            {
                "variant": name,
                "median_s": round(statistics.median(seconds), 4),
                **_ratio("speedup", baseline, seconds),
                **(_ratio("share_of_network", network, seconds) if name == "diffalign" else {}),
            }
        )
    return rows


def in_turn(takes: dict[str, Step], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run every step once a round, and return the seconds of each after the warm-up."""
    times: dict[str, list[float]] = {name: [] for name in takes}
    for step in range(rounds + WARM_UP):
        for name, take in takes.items():
            seconds = timed(lambda take=take, step=step: take(step))
            if step >= WARM_UP:
                times[name].append(seconds)
    return times


def _ratio(name: str, slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Return the median and the quartiles of the ratios within a round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {name: round(statistics.median(ratios), 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}


def scaling(place: Path) -> list[dict[str, Any]]:
    """Time a step, and read the peak of memory, at other batch sizes and resolutions, each in a process of its own."""
    settings = [(pairs, 64) for pairs in SCALES["pairs"]] + [
        (16, pixels) for pixels in SCALES["pixels"] if pixels != 64
    ]
    rows = []
    for pairs, pixels in settings:
        command = [sys.executable, "-m", "benchmarks.cpu", str(place), str(pairs), str(pixels)]
        seconds, gibibytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        rows.append({"pairs": pairs, "pixels": pixels, "median_s": float(seconds), "peak_memory_gib": float(gibibytes)})
    return rows


def one_size(place: Path, pairs: int, pixels: int) -> None:
    """Print the median seconds of a step and the process's peak of memory in GiB."""
    overrides = [f"train_batch_size={pairs}", f"data.resolution={pixels}"]
    take = cpu_step.diffalign_step(cpu_step.settings(place, *overrides))
    seconds = in_turn({"step": take}, rounds=5)["step"]
    print(round(statistics.median(seconds), 4), round(peak_memory_gib(torch.device("cpu")), 2))


def end_to_end(place: Path) -> dict[str, Any]:
    """Time a run from pictures to exported weights: caches, 100 steps, export."""
    config = cpu_step.settings(place / "fresh", "max_train_steps=100", "checkpointing_steps=100")
    first = timed(lambda: cpu_step.fill_caches(config))
    second = timed(lambda: cpu_step.run(config))
    pairs = 100 * config.train.train_batch_size
    return {
        "precompute_s": round(first, 1),
        "train_s": round(second, 1),
        "pairs_per_second": round(pairs / (first + second), 1),
    }


def timed(take: Callable[[], Any]) -> float:
    """Return the seconds a call takes."""
    start = time.perf_counter()
    take()
    return time.perf_counter() - start


if __name__ == "__main__":
    one_size(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
