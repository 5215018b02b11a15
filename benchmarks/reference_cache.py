"""`python -m benchmarks.reference_cache`: one optimizer step with stored errors of the reference, and without.

Three sides see batches of the same size in turn, in one process: what the public scripts do (`cpu_step`), diffalign as
it is, and diffalign with a complete reference cache. Read the ratios: they compare neighbours in time.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import cpu_step
from diffalign.jobs.training.precompute import precompute

ROUNDS = 15
WARM_UP = 2


def run(folder: Path) -> dict[str, object]:
    """Time the steps in turn; return medians in seconds and the medians and quartiles of the paired ratios."""
    plain = cpu_step.settings(folder)
    cached = cpu_step.settings(folder, "reference.cache_draws=1")
    start = time.perf_counter()
    precompute(plain, Console(quiet=True))
    encoded = time.perf_counter()
    precompute(cached, Console(quiet=True))
    filled = time.perf_counter()
    sides = {
        "script": cpu_step.script_step(plain),
        "without": cpu_step.diffalign_step(plain),
        "with_cache": cpu_step.diffalign_step(cached),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(WARM_UP + ROUNDS):
        for name, take in sides.items():
            begun = time.perf_counter()
            take(step)
            seconds[name].append(time.perf_counter() - begun)
    seconds = {name: times[WARM_UP:] for name, times in seconds.items()}
    return {
        "what": f"LoRA r{cpu_step.RANK} DPO step, {plain.train.train_batch_size} pairs, 64 px, {ROUNDS} rounds",
        "threads": torch.get_num_threads(),
        "median_s": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "speedup_over_without": _ratios(seconds["without"], seconds["with_cache"]),
        "speedup_over_script": _ratios(seconds["script"], seconds["with_cache"]),
        "precompute_latents_s": round(encoded - start, 1),
        "precompute_reference_s": round(filled - encoded, 1),
    }


def _ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(Path(temporary)), indent=1))
