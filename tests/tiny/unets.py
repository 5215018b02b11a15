"""Tiny SD1.5 and SDXL."""

from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from tests.tiny.parts import DDPM_SCHEDULE, LATENT_SIZE, save, tiny_text_config, tiny_tokenizer, tiny_vae


def tiny_unet_sdxl() -> UNet2DConditionModel:
    """Return SDXL's UNet topology (three levels, two layers a block, 0/1/2 transformers) at a few channels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def tiny_unet_sd15() -> UNet2DConditionModel:
    """Return SD1.5's UNet topology (four levels, two layers a block, convolutional projections) at a few channels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(16, 16, 16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    )


def build_tiny_sdxl(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight StableDiffusionXLPipeline of about 0.5 M parameters to `directory` and return its path."""
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(0.13025),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 16, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer_2, 32, "gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=tiny_unet_sdxl(),
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **DDPM_SCHEDULE),
            add_watermarker=False,
        )
    return save(pipeline, directory)


def build_tiny_sd15(directory: str | Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Write a random-weight StableDiffusionPipeline of about 0.5 M parameters to `directory` and return its path."""
    tokenizer = tiny_tokenizer()
    schedule = DDPM_SCHEDULE | {"prediction_type": prediction_type}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(0.18215),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, 32, "quick_gelu")),
            tokenizer=tokenizer,
            unet=tiny_unet_sd15(),
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return save(pipeline, directory)
