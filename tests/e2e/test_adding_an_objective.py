"""The worked example of docs/adding-an-objective.md, taken as it stands, is an objective."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-an-objective.md").read_text(encoding="utf8")


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Return a copy of the code to which the page's two files were added, and nothing else."""
    folder = tmp_path_factory.mktemp("extended")
    for part in ("diffalign", "reward_models", "configs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "diffalign" / "objectives" / "chipo.py").write_text(block("python"), encoding="utf8")
    (folder / "configs" / "tiny" / "chipo.yaml").write_text(block("yaml"), encoding="utf8")
    return folder


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_trains_from_the_command_line(extended):
    settings = [
        "max_train_samples=8",
        "max_train_steps=2",
        "train_batch_size=2",
        "objective.reward_range=5",
        "report_to=[]",
    ]
    run(extended, "-m", "diffalign", "train", "configs/tiny/chipo.yaml", *settings)
    assert (extended / "runs" / "tiny-chipo" / "pytorch_lora_weights.safetensors").exists()
    assert "reward_range: 5" in (extended / "runs" / "tiny-chipo" / "config.yaml").read_text()


def test_the_property_tests_find_it(extended):
    told = run(extended, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-v", "-k", "chipo",
               "tests/properties/test_objectives.py")  # fmt: skip
    assert told.count("PASSED") > 8
