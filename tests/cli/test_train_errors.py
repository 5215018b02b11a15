"""Bad input at `diffalign train`: exit code 2, a message that helps, no traceback, nothing lost."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from diffalign.cli import main
from tests.e2e.pairs import write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny_sdxl, tmp_path):
    """Write a valid tiny configuration and return its path; tests break it by overrides."""
    content = {
        "model": {"pretrained_model_name_or_path": str(tiny_sdxl)},
        "data": {
            "train_data_dir": str(write_pairs(tmp_path / "pairs", 8)),
            "resolution": 64,
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"name": "dpo"},
        "train": {"output_dir": str(tmp_path / "run"), "train_batch_size": 2, "max_train_steps": 1},
        "logging": {"report_to": []},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def fails(monkeypatch, capsys, config):
    """Return a function that runs `diffalign train`, requires exit code 2 and returns the message."""

    def run(*arguments, file=config):
        monkeypatch.setattr(sys, "argv", ["diffalign", "train", str(file), *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2, captured
        assert "Traceback" not in captured.err
        return " ".join(captured.err.split())

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.betta=1", 'Unknown key "objective.betta". Did you mean "beta"?'),
        ("objective.name=dop", 'Unknown objective "dop". Did you mean "dpo"?'),
        ("max_train_steps=ten", '"train.max_train_steps" must be an integer'),
        ("learning_rate=true", '"optimizer.learning_rate" must be a number'),
        ("learnin_rate=1", 'Did you mean "optimizer.learning_rate"?'),
        ("global_batch_size=3", "train.global_batch_size 3 is not divisible by world_size 1 x train_batch_size 2"),
        ("train_data_dir=/nowhere/pairs.parquet", "/nowhere/pairs.parquet"),
        ("pretrained_model_name_or_path=/nowhere/model", 'There is no model at "/nowhere/model"'),
        ("beta", "key=value"),
    ],
)
def test_wrong_values(fails, override, message):
    assert message in fails(override)


def test_missing_configuration(fails, tmp_path):
    assert "Cannot read the configuration" in fails(file=tmp_path / "missing.yaml")


def test_truncated_parquet(fails, tmp_path):
    file = tmp_path / "pairs" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    assert "train.parquet" in fails()


def test_truncated_image_names_its_row(fails, tmp_path):
    file = tmp_path / "pairs" / "train.parquet"
    table = pq.read_table(file).to_pylist()
    table[3]["jpg_1"] = table[3]["jpg_1"][:200]
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), file)
    message = fails()
    assert "row 3" in message
    assert "skip" in message


def test_only_ties(fails, tmp_path):
    import pyarrow as pa

    file = tmp_path / "pairs" / "train.parquet"
    table = [{**row, "label_0": 0.5, "label_1": 0.5} for row in pq.read_table(file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(table), file)
    assert "ties" in fails()


def test_missing_column(fails, tmp_path):
    file = tmp_path / "pairs" / "train.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["jpg_1"]), file)
    message = fails()
    assert "jpg_1" in message
    assert "caption" in message  # the columns that are there


def test_pickle_where_safetensors_is_expected(fails, tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, file)
    message = fails(f"pretrained_model_name_or_path={file}")
    assert "safetensors" in message


def test_truncated_checkpoint_of_the_model(fails, tiny_sdxl, tmp_path):
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(tiny_sdxl, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "broken" in fails(f"pretrained_model_name_or_path={folder}")


def test_resume_under_other_settings(fails, config, tmp_path):
    command = [sys.executable, "-m", "diffalign", "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    message = fails("--resume", "latest", "beta=100", "max_train_steps=2")
    assert "objective.beta: 5000.0 there, 100.0 now" in message


def test_disk_full_during_a_checkpoint_keeps_the_one_before(fails, tmp_path, monkeypatch):
    import diffalign.training.checkpoint as checkpoint

    saved = []
    real = checkpoint.save_file

    def fill_up(tensors, path, **options):
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    message = fails("checkpointing_steps=1", "max_train_steps=3")
    assert "No space left on device" in message
    assert "checkpoint-1 is intact" in message
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-1"]
