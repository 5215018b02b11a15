"""Installed from a wheel, in an empty folder: what ships travels, and the first commands work."""

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEGABYTES = 60  # the size that a wheel must not pass
SMALL = "base: tiny/dpo\ndata: {max_train_samples: 32}\ntrain: {max_train_steps: 2}\nlogging: {report_to: []}\n"
PROMPTS = "a red circle on a blue background\ntwo green squares on a white background\n"
COMMANDS = [
    "list configs",
    "show config sdxl/dpo-lora",
    "show key train_batch_size",
    "train sdxl/dpo-lora optimizer.name=adamw max_train_samples=100 --dry-run --gpu-memory 24",
    "train tiny/dpo max_train_steps=1 max_train_samples=32 report_to=[]",
    "demo --config small.yaml --prompts prompts.txt",
    "generate runs/demo --prompts prompts.txt --steps 2 --out pictures",
    "score pictures --with pickscore=assets/tiny-pickscore,oracle",
    "export runs/demo --format kohya --out kohya",
    "evaluate assets/tiny-sdxl runs/demo/checkpoint-2 --prompts prompts.txt --with oracle --steps 2 --out report",
]
# All in one process, since torch takes seconds to import; errors are not caught.
DRIVER = """
import sys, diffalign
from diffalign.cli import app
print(diffalign.__file__)
for command in sys.argv[1:]:
    print("$", command, flush=True)
    app(command.split(), standalone_mode=False)
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", ROOT, *options, "--wheel-dir", folder)
    (file,) = folder.glob("diffalign-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return an environment in which the wheel lies beside the packages that are here."""
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel)
    return {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}, site


def test_the_wheel_is_whole_and_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for kind in ("configs", "assets"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / kind).rglob("*") if path.is_file()}
        assert {f"diffalign/shipped/{file}" for file in files} <= names
    assert {"diffalign/evaluation/templates/report.html.j2", "diffalign/labelling/page.html"} <= names
    assert wheel.stat().st_size < MEGABYTES * 1e6


@pytest.mark.parametrize("extra", ["label", "dev"])
def test_its_extras_resolve(wheel, extra):
    """Against what is installed here: no index is asked."""
    run(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", f"{wheel}[{extra}]")


def test_the_first_commands_in_an_empty_folder(installed, tmp_path):
    environment, site = installed
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    said = run(sys.executable, "-P", "-c", DRIVER, *COMMANDS, cwd=tmp_path, env=environment)
    assert said.startswith(str(site))
    assert "tiny/dpo" in said
    assert "pretrained_model_name_or_path: stabilityai/stable-diffusion-xl-base-1.0" in said
    for file in ("runs/tiny-dpo/pytorch_lora_weights.safetensors", "runs/demo/grid.png", "runs/demo/report.html"):
        assert (tmp_path / file).is_file(), file
    assert json.loads((tmp_path / "runs/demo/summary.json").read_text())["scorers"].keys() >= {"oracle", "pickscore"}
    for file in ("scores.parquet", "kohya/demo.safetensors", "report/report.html"):
        assert (tmp_path / file).is_file(), file


def test_the_installed_command_answers(installed, tmp_path):
    environment, site = installed
    assert "tiny/dpo" in run(site / "bin" / "diffalign", "list", "configs", cwd=tmp_path, env=environment)
