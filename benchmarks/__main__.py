"""`make bench`: run the benchmarks of this machine and record them under benchmarks/results/."""

import datetime
import json
from pathlib import Path

import torch

from benchmarks import cpu_step
from diffalign.jobs.train import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure the optimizer step on the CPU; write a JSON file named after the day and print it."""
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "cpu_step": cpu_step.run(),
    }
    file = RESULTS / f"{record['date']}-cpu-step.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    print(json.dumps(record["cpu_step"], indent=1))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
