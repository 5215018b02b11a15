"""What is only told, and every mistake in a setting, is answered before torch is imported: that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "pandas", "peft", "datasets", "scipy", "numpy")
CASES = {
    "train configs/tiny/dpo.yaml objective.betta=2000": 'Did you mean "beta"?',
    "train configs/tiny/dpo.yaml objective.beta=-1": "must be a finite number > 0",
    "train configs/tiny/dpo.yaml objective.name=dop": 'Did you mean "dpo"?',
    "train configs/tiny/dpo.yaml lerning_rate=1e-5": 'Did you mean "optimizer.learning_rate"?',
    "train configs/tiny/dpo.yaml --learning_rate 1e-5": "learning_rate=1e-5",
    "train configs/tiny/dpo.yaml max_train_steps=ten": "must be an integer",
    "train configs/tiny/mapo.yaml loss.anchor_weight=1": "needs an objective with a reference",
    "train configs/tiny/spo.yaml rollout.collect=one_step": "must be one of step_pairs",
    "train configs/tiny/dpp.yaml": "dpp",
    "show key lerning_rate": 'Did you mean "optimizer.learning_rate"?',
    "show key train_batch_size": "whole number >= 1",
    "show objective kto": "kahneman_tversky",
    "show config configs/tiny/dpo.yaml": "beta: 250.0",
    "list configs": "Diffusion-DPO",
    "list objectives": "mapo",
    "list keys": "optimizer.learning_rate",
    "--help": "precompute",
    "train --help": "--dry-run",
}
SCRIPT = """
import contextlib, io, json, sys
from diffalign.cli import main
said = {}
for case in json.loads(sys.argv[1]):
    sys.argv = ["diffalign", *case.split()]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    said[case] = [code, out.getvalue(), [name for name in json.loads(HEAVY) if name in sys.modules]]
print(json.dumps(said))
""".replace("HEAVY", repr(json.dumps(HEAVY)))


@pytest.fixture(scope="module")
def answers():
    """Return exit code, output and heavy imports so far of every case, all in one new process."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(CASES))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_it_is_answered_without_torch(answers, case):
    code, said, imported = answers[case]
    assert imported == []
    assert CASES[case] in said
    tells = case.startswith(("show ", "list ")) and "lerning" not in case
    assert code == (0 if tells or "--help" in case else 2)
