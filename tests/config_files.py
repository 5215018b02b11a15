"""A minimal configuration file for tests."""

from pathlib import Path

MINIMAL = """
model:
  pretrained_model_name_or_path: some/model
data:
  train_data_dir: pairs
objective:
  name: dpo
  beta: 2000.0
"""


def write(folder: Path, text: str = MINIMAL, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf8")
    return path
