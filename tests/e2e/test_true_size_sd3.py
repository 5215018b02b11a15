"""One optimizer step of the true-size SD3.5-medium through `diffalign train`: random weights, bf16, LoRA, 512 px."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file

from diffalign.backbones import published
from tests.e2e.pairs import write_pairs
from tests.e2e.test_true_size import ROOT, text_encoder

PARAMETERS = 2_243_171_520
RANK = 32


def write_true_size_pipeline(folder: Path) -> Path:
    """Write a pipeline whose transformer is SD3.5-medium's in every dimension, in bfloat16 (4.5 GB); it has no T5."""
    transformer = published.random_transformer("stabilityai/stable-diffusion-3.5-medium", torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=16,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae.to(torch.bfloat16),
        text_encoder=text_encoder(768, True),
        text_encoder_2=text_encoder(1280, True),
        text_encoder_3=None,
        tokenizer=published.clip_tokenizer("<|endoftext|>"),
        tokenizer_2=published.clip_tokenizer("!"),
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.slow
def test_a_step_of_true_size_sd3_trains_on_a_cpu(tmp_path):
    model = write_true_size_pipeline(tmp_path / "sd3")
    overrides = [
        f"pretrained_model_name_or_path={model}",
        f"train_data_dir={write_pairs(tmp_path / 'pairs', 2, side=512)}",
        f"cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        f"lora.rank={RANK}",
        "train_batch_size=1",
        "global_batch_size=1",
        "max_train_steps=1",
        "gradient_checkpointing=false",
        "validation_steps=null",
        "report_to=none",
    ]
    command = [sys.executable, "-m", "diffalign", "train", "sd3/dpo-lora", *overrides]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{time.monotonic() - started:.0f} s, {line['peak_memory_gib']:.1f} GiB, {line}")
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6)  # exactly log 2: policy and reference are the same bits
    assert line["margin"] == 0.0
    assert line["grad_norm"] > 0
    lora = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    moved = [name for name, tensor in lora.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == len(lora) // 2  # every B left zero: the gradient reached every adapted layer
    assert line["peak_memory_gib"] < 24
