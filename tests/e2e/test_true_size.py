"""One optimizer step of the true-size SDXL UNet through `diffalign train`: random weights, bf16, LoRA r64, 256 px."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.backbones import published
from tests.e2e.pairs import write_pairs

ROOT = Path(__file__).parents[2]
PARAMETERS = 2_567_463_684


def text_encoder(width: int, projection: bool) -> torch.nn.Module:
    """Build a text encoder of the true width with a single layer and head count, so that only the UNet is large."""
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, projection_dim=width
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).to(torch.bfloat16)


def write_true_size_pipeline(folder: Path) -> Path:
    """Write a pipeline whose UNet is SDXL base's in every dimension, with random weights in bfloat16 (5.1 GB)."""
    unet = published.random_unet("sdxl", torch.bfloat16)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
    )
    StableDiffusionXLPipeline(
        vae=vae.to(torch.bfloat16),
        text_encoder=text_encoder(768, False),
        text_encoder_2=text_encoder(1280, True),
        tokenizer=published.clip_tokenizer("<|endoftext|>"),
        tokenizer_2=published.clip_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.slow
def test_a_step_of_true_size_sdxl_trains_on_a_cpu(tmp_path):
    model = write_true_size_pipeline(tmp_path / "sdxl")
    data = write_pairs(tmp_path / "pairs", 2, side=256)
    output = tmp_path / "run"
    overrides = [
        f"pretrained_model_name_or_path={model}",
        "pretrained_vae_model_name_or_path=null",
        "dataset_name=null",
        f"train_data_dir={data}",
        f"cache_dir={tmp_path / 'cache'}",
        f"output_dir={output}",
        "resolution=256",
        "rank=64",
        "optimizer.name=adamw",
        "train_batch_size=1",
        "global_batch_size=1",
        "max_train_steps=1",
        "gradient_checkpointing=false",
        "validation_steps=null",
        "export_kohya=false",
    ]
    command = [sys.executable, "-m", "diffalign", "train", "configs/sdxl/dpo-lora.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6)  # exactly log 2: policy and reference are the same bits
    assert line["margin"] == 0.0
    assert line["grad_norm"] > 0
    lora = load_file(output / "pytorch_lora_weights.safetensors")
    moved = [name for name, tensor in lora.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert sum(t.numel() for t in lora.values()) == 92_897_280
    assert len(moved) == len(lora) // 2  # every B left zero: the gradient reached every adapted layer
    assert line["peak_memory_gib"] < 24
