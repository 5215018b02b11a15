"""Tiny models whose prompts a language model reads: FLUX.2, Qwen-Image, SANA, Lumina-Image 2.0, Z-Image."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from diffalign.backbones.published import SHIFTS
from tests.tiny.parts import (
    IMAGE_SIZE,
    LATENT_SIZE,
    tiny_gemma,
    tiny_gemma_tokenizer,
    tiny_pixtral_processor,
    tiny_qwen_tokenizer,
    tiny_vae,
)


def tiny_transformer_flux2(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    """Return FLUX.2's topology (blocks of two streams, then of one) with two blocks of each and 32 channels."""
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def tiny_vae_flux2() -> AutoencoderKLFlux2:
    """Return an autoencoder that halves the image twice, with the statistics of some latents."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.2)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def build_tiny_klein(directory: str | Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a random-weight Flux2KleinPipeline of about 0.3 M parameters to `directory` and return its path.

    The text encoder has as many layers as the pipeline reads from.
    """
    tokenizer = tiny_qwen_tokenizer()
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 28, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            vae=tiny_vae_flux2(),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_flux2(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            is_distilled=is_distilled,
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def build_tiny_flux2_dev(directory: str | Path, seed: int = 1) -> Path:
    """Write a random-weight Flux2Pipeline of about 0.3 M parameters to `directory` and return its path.

    The text encoder has as many layers as the pipeline reads from.
    """
    processor = tiny_pixtral_processor()
    shape = {"hidden_size": 8, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 1}
    words = {"vocab_size": len(processor.tokenizer), "num_key_value_heads": 1, "num_hidden_layers": 30}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **shape, **words},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, **shape},
        image_token_index=processor.image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2Pipeline(
            vae=tiny_vae_flux2(),
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=processor,
            transformer=tiny_transformer_flux2(guidance_embeds=True),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_qwen(**settings) -> QwenImageTransformer2DModel:
    """Return Qwen-Image's topology with two blocks of 32 channels."""
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **settings,
    )


def tiny_vae_qwen() -> AutoencoderKLQwenImage:
    """Return an autoencoder of films that halves a picture twice, with Qwen-Image's means and deviations."""
    return AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True])


def build_tiny_qwen(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight QwenImagePipeline of about 0.3 M parameters to `directory` and return its path."""
    tokenizer = tiny_qwen_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    text["rope_scaling"] = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            vae=tiny_vae_qwen(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_qwen(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTS["qwen"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_sana(**settings) -> SanaTransformer2DModel:
    """Return SANA's topology with two blocks of 16 channels."""
    return SanaTransformer2DModel(
        sample_size=LATENT_SIZE,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=16,
        **settings,
    )


def tiny_vae_sana() -> AutoencoderDC:
    """Return an autoencoder that halves the image twice into 32 channels, with both kinds of SANA's blocks."""
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )


def build_tiny_sana(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight SanaPipeline of about 0.1 M parameters to `directory` and return its path."""
    tokenizer = tiny_gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            vae=tiny_vae_sana(),
            text_encoder=tiny_gemma(tokenizer),
            tokenizer=tokenizer,
            transformer=tiny_transformer_sana(),
            scheduler=DPMSolverMultistepScheduler(**SHIFTS["sana"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_lumina2() -> Lumina2Transformer2DModel:
    """Return Lumina-Image 2.0's topology with two blocks of 24 channels and a refiner of each kind."""
    return Lumina2Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 8, 8),
        cap_feat_dim=16,
    )


def build_tiny_lumina2(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight Lumina2Pipeline of about 0.1 M parameters to `directory` and return its path.

    Its VAE is of 1/8 as the published one: the pipeline takes that for granted.
    """
    tokenizer = tiny_gemma_tokenizer()
    vae = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Lumina2Pipeline(
            vae=tiny_vae(0.3611, 16, halvings=3, **vae),
            text_encoder=tiny_gemma(tokenizer),
            tokenizer=tokenizer,
            transformer=tiny_transformer_lumina2(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTS["lumina2"]),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def tiny_transformer_zimage() -> ZImageTransformer2DModel:
    """Return Z-Image's topology with two blocks of 32 channels, and tokens of padding that are not zeros."""
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def build_tiny_zimage(directory: str | Path, seed: int = 0) -> Path:
    """Write a random-weight ZImagePipeline of about 0.4 M parameters to `directory` and return its path."""
    tokenizer = tiny_qwen_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            vae=tiny_vae(0.3611, 16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads)),
            tokenizer=tokenizer,
            transformer=tiny_transformer_zimage(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)
