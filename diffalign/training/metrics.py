"""Metrics: averaged on the device, fetched when they are written, one JSON line each time."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.errors import UserError
from diffalign.text_files import read_lines


class MetricsError(UserError):
    """Report metrics that cannot be written."""


class RunningMean:
    """Average per-example metrics over micro-batches, steps and ranks; nothing is copied to the host before `pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the values of some examples, each [B] (or a scalar, for the metrics of a step)."""
        for name, values in metrics.items():
            total = values.double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + values.numel()

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over everything added on all ranks since the last call."""
        means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        means = accelerator.reduce(means.float(), reduction="mean")
        values = dict(zip(self._sums, means.tolist(), strict=True))
        self.__init__()
        return values

    def state_dict(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """Return sum and count of each metric since the last `pop`, the mean over ranks; all of them must call this."""
        if not self._sums:
            return {}
        sums = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="mean").tolist()
        return {name: [total, self._counts[name]] for name, total in zip(self._sums, sums, strict=True)}

    def load_state_dict(self, saved: dict[str, list[float]], device: torch.device) -> None:
        """Go on from what was added before a checkpoint."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=device) for name, (total, _) in saved.items()
        }
        self._counts = {name: count for name, (_, count) in saved.items()}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU if there is one, else of the process (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `resource` begins with the peak of the process that started this one
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class MetricsLog:
    """Write metrics to `metrics.jsonl` and to the trackers; measure throughput between two writes."""

    def __init__(self, path: Path, accelerator: Accelerator, from_step: int, pairs_per_step: int):
        """Open the log for steps after `from_step`; lines of later steps, left by a run that died, are cut off."""
        self.path, self.accelerator, self.pairs_per_step = path, accelerator, pairs_per_step
        self._step, self._time = from_step, time.perf_counter()
        self.last: dict[str, float] = {}
        if accelerator.is_main_process:
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                kept = [line for line in read(path) if line["step"] <= from_step]
                path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf8")
            self.last = kept[-1] if kept else {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in the context, with checkpoints and pictures, out of the throughput."""
        before = time.perf_counter()
        yield
        self._time += time.perf_counter() - before

    def write(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Add throughput and memory to the metrics of the steps up to `step`, write the line and return it."""
        now = time.perf_counter()
        speed = (step - self._step) * self.pairs_per_step / (now - self._time)
        self._step, self._time = step, now
        memory = peak_memory_gib(self.accelerator.device)
        line = {"step": step, **values, "pairs_per_second": speed, "peak_memory_gib": memory}
        if self.accelerator.is_main_process:
            with _writing(self.path), self.path.open("a", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        return line


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that may not be written, into an error for the user."""
    try:
        yield
    except OSError as error:
        raise MetricsError(
            f"Cannot write {path}: {error.strerror or error}. Free some space, or name another train.output_dir. A run "
            "that has a checkpoint continues with --resume latest."
        ) from error


def read(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file, leaving out a last line that was cut short; [] if there is no file."""
    lines = []
    for text in read_lines(path) if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
