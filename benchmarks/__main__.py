"""`python -m benchmarks [cpu-step | methods | label-noise]`: measure, and record under benchmarks/results/."""

import argparse
import datetime
import json
from pathlib import Path

import torch

from benchmarks import cpu_step, label_noise, methods
from diffalign.jobs.train import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("cpu-step", help="the optimizer step on this CPU, against what the public scripts do (default)")
    compared = commands.add_parser("methods", help="every objective on the embedded world; hours on two cores")
    compared.add_argument("names", nargs="*", help="only these objectives")
    compared.add_argument("--table-only", action="store_true", help="train nothing, tabulate what there is")
    compared.add_argument("--output", type=Path, default=Path("runs/methods").resolve())
    noise = commands.add_parser("label-noise", help="DPO against robust DPO under flipped labels")
    noise.add_argument("--output", type=Path, default=Path("runs/label-noise").resolve())
    asked = parser.parse_args()
    if asked.command == "methods":
        methods.main(asked.names, asked.output, asked.table_only)
    elif asked.command == "label-noise":
        label_noise.main(asked.output)
    else:
        measure_cpu_step()


def measure_cpu_step() -> None:
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
