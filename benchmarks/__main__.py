"""`python -m benchmarks NAME`; NAME is cpu (the default) or one of the commands below."""

import argparse
import datetime
import json
from pathlib import Path

import torch

from benchmarks import (
    cpu,
    filtering_study,
    gpu,
    label_noise,
    methods,
    over_optimisation,
    reward_agreement,
    score_speed,
)
from diffalign.jobs.training.train import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    steps = commands.add_parser("cpu", help="the optimizer step on this CPU, against what the public scripts do")
    steps.add_argument("names", nargs="*", help=f"only these variants: {', '.join(cpu.VARIANTS)}")
    graphics = commands.add_parser("gpu", help="passes and steps of SDXL and SD1.5 with random weights on this GPU")
    graphics.add_argument("--minutes", type=float, default=25.0, help="stop after the measurement that exceeds this")
    graphics.add_argument("--tiny", action="store_true", help="on the embedded UNet, to see that everything runs")
    graphics.add_argument("--output", type=Path, help="a JSON file; by default under benchmarks/results/")
    compared = commands.add_parser("methods", help="methods tuned alike, three seeds each; many hours on two cores")
    methods.add_arguments(compared)
    noise = commands.add_parser("label-noise", help="DPO against robust DPO under flipped labels")
    noise.add_argument("--output", type=Path, default=Path("runs/label-noise").resolve())
    chosen = commands.add_parser("filtering", help="DPO on chosen pairs against DPO on all, with flipped labels")
    chosen.add_argument("--output", type=Path, default=Path("runs/filtering").resolve())
    chosen.add_argument("--text-quality", type=Path, help="ratings of the prompts, for `diffalign filter`")
    rewarded = commands.add_parser("over-optimisation", help="reward against oracle at every checkpoint of online runs")
    rewarded.add_argument(
        "runs", nargs="+", type=Path, help="folders of spo, d3po, ddpo, refl, draft or alignprop runs"
    )
    rewarded.add_argument("--output", type=Path, default=Path("runs/over-optimisation").resolve())
    agreeing = commands.add_parser("reward-agreement", help="the embedded reward models against the oracle")
    agreeing.add_argument("--output", type=Path, default=Path("runs/reward-agreement").resolve())
    scoring = commands.add_parser("score", help="`diffalign score` against the loop of the published packages")
    scoring.add_argument("--large", action="store_true", help="ViT-H with random weights on a GPU instead")
    asked = parser.parse_args()
    if asked.command == "methods":
        methods.main(asked)
    elif asked.command == "gpu":
        file = asked.output or RESULTS / f"{datetime.date.today().isoformat()}-gpu{'-tiny' if asked.tiny else ''}.json"
        gpu.run(file, asked.minutes, asked.tiny)
    elif asked.command == "label-noise":
        label_noise.main(asked.output)
    elif asked.command == "filtering":
        filtering_study.main(asked.output, asked.text_quality)
    elif asked.command == "score":
        measure_score(asked.large)
    elif asked.command == "reward-agreement":
        write("reward-agreement", reward_agreement.run(asked.output))
    elif asked.command == "over-optimisation":
        over_optimisation.main(asked.runs, asked.output)
    else:
        measure_cpu(getattr(asked, "names", []))


def measure_cpu(names: list[str]) -> None:
    """Measure the optimizer step on the CPU."""
    write("cpu", cpu.run(names))


def measure_score(large: bool) -> None:
    """Measure the embedded scorers on the CPU, or with `large` ViT-H on a GPU; without one nothing is written."""
    measured = score_speed.run_large() if large else score_speed.run()
    if isinstance(measured, str):
        print(f"{measured}: there is no GPU")
    else:
        write("score-large" if large else "score", measured)


def write(name: str, measured: object) -> None:
    """Write a JSON file named after the day and the benchmark, and print what was measured."""
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        name: measured,
    }
    file = RESULTS / f"{record['date']}-{name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    print(json.dumps(measured, indent=1))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
