"""Tiny models whose prompts T5 reads: SD3, FLUX.1 and PixArt."""

from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.tiny.parts import LATENT_SIZE, save, tiny_t5_tokenizer, tiny_text_config, tiny_tokenizer, tiny_vae


def tiny_transformer_sd3() -> SD3Transformer2DModel:
    """Return SD3.5-medium's topology (its first block has a second attention) with two blocks of 64 channels."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def tiny_transformer_flux(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    """Return FLUX.1's topology (blocks of two streams, then of one) with a block and two of 32 channels."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def tiny_transformer_pixart(**settings) -> PixArtTransformer2DModel:
    """Return PixArt's topology with two blocks of 24 channels."""
    return PixArtTransformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        **settings,
    )


def build_tiny_sd3(directory: str | Path, seed: int = 0, t5: bool = True) -> Path:
    """Write a random-weight StableDiffusion3Pipeline of about 0.4 M parameters to `directory` and return its path."""
    first, second = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    third = tiny_t5_tokenizer() if t5 else None
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            vae=tiny_vae(1.5305, 16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(tiny_text_config(first, 8, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second, 16, "gelu")),
            text_encoder_3=T5EncoderModel(T5Config(vocab_size=len(third), **shape)) if t5 else None,
            tokenizer=first,
            tokenizer_2=second,
            tokenizer_3=third,
            transformer=tiny_transformer_sd3(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return save(pipeline, directory)


def build_tiny_flux(directory: str | Path, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a random-weight FluxPipeline of about 0.3 M parameters to `directory` and return its path."""
    first, second = tiny_tokenizer(), tiny_t5_tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            vae=tiny_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(tiny_text_config(first, 16, "quick_gelu")),
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(second), **shape)),
            tokenizer=first,
            tokenizer_2=second,
            transformer=tiny_transformer_flux(guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    return save(pipeline, directory)


def build_tiny_pixart(directory: str | Path, generation: str, seed: int = 0, **settings) -> Path:
    """Write a random-weight pipeline of about 0.1 M parameters of PixArt-"alpha" or "sigma" and return its path.

    alpha: of 1024 pixels, told the size of the picture. settings: of the transformer.
    """
    kind, sides, factor = {
        "alpha": (PixArtAlphaPipeline, {"sample_size": 128}, 0.18215),
        "sigma": (PixArtSigmaPipeline, {"sample_size": LATENT_SIZE}, 0.13025),
    }[generation]
    tokenizer = tiny_t5_tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = kind(
            vae=tiny_vae(factor),
            text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_pixart(**(sides | settings)),
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        )
    return save(pipeline, directory)
