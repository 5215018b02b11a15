"""Real things for the commands to work on: a finished run, tiny scorers, labelled pairs."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from diffalign import backbones
from diffalign import config as configuration
from diffalign.backbones import adapters, export
from diffalign.backbones.files import LORA_FILE
from diffalign.training import checkpoint
from diffalign.training.sealing import MANIFEST
from reward_models.tiny import TinySizes, build_tiny_hpsv2, build_tiny_pickscore
from reward_models.tokenization import learn_merges, write_bpe_file, write_hf_tokenizer
from tests.backbones.drawing import perturb
from tests.evaluation.toy import painted

PROMPTS = ["a red circle on a blue background", "two green stars on a black background"]
SIZES = TinySizes(
    image_size=32, patch_size=8, vision_width=32, vision_layers=2, text_width=32, text_layers=2, heads=2, projection=16
)


@dataclass(frozen=True)
class Run:
    """Say where the parts of a training run are."""

    folder: Path
    base: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint-3"


def write_run(folder: Path, base: Path, tune: str = "lora", seed: int = 1, alpha: float = 6.0) -> Run:
    """Write what a training run leaves: config.yaml, exported weights and a checkpoint of the same weights."""
    content = {
        "model": {"pretrained_model_name_or_path": str(base), "tune": tune},
        "lora": {"rank": 2, "lora_alpha": alpha},
        "data": {"train_data_dir": "pairs"},
        "objective": {"name": "dpo"},
        "train": {"output_dir": str(folder)},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configuration.dump(configuration.check(content)))
    denoiser = backbones.load(base).denoiser
    weights_file = checkpoint.WeightsFile()
    if tune == "lora":
        perturb(adapters.add_lora(denoiser, 2, alpha), seed, scale=0.3)
        export.save_lora(denoiser, folder, str(base))
        header = export.lora_header(denoiser, str(base))
        weights_file = checkpoint.WeightsFile(LORA_FILE, export.lora_keys(denoiser), header)
    else:
        perturb(denoiser.parameters(), seed, scale=0.02)
        export.save_denoiser(denoiser, folder)
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    checkpoint.save(folder, 3, trained, {}, {}, None, weights_file)
    return Run(folder, base)


def as_it_was(folder: Path) -> Path:
    """Give a checkpoint of a LoRA the layout it had before 2026-12: weights by the names of the parameters.

    There was no manifest either.
    """
    tensors = load_file(folder / LORA_FILE)
    named = {re.sub(r"^unet\.(.+\.lora_[AB])\.", r"\1.default.", key): tensor for key, tensor in tensors.items()}
    save_file(named, folder / checkpoint.WEIGHTS)
    (folder / LORA_FILE).unlink()
    (folder / MANIFEST).unlink()
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["manifest"]
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    return folder


def write_scorers(root: Path) -> dict[str, Path]:
    """Write the folder of each tiny scorer by name."""
    root.mkdir()
    merges = learn_merges(PROMPTS, 40)
    tokenizer = write_hf_tokenizer(root / "tokenizer", merges, text_length=SIZES.text_length)
    bpe_file = write_bpe_file(root / "vocabulary.txt.gz", merges)
    return {
        "pickscore": build_tiny_pickscore(root / "tiny-pickscore", tokenizer, seed=0, sizes=SIZES),
        "hpsv2": build_tiny_hpsv2(root / "tiny-hpsv2", bpe_file, seed=0, sizes=SIZES),
    }


def png(level: int, seed: int = 0) -> bytes:
    """Return an encoded picture of noise around a grey level."""
    buffer = io.BytesIO()
    painted(level, 32, seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(file: Path, rows: list[tuple[bytes, bytes, float, str]]) -> Path:
    """Write (image_0, image_1, label_0, caption) in Pick-a-Pic's columns."""
    names = ("jpg_0", "jpg_1", "label_0", "caption")
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), file)
    return file
