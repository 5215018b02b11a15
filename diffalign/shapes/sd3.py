"""An embedded flow model, untrained: a real `StableDiffusion3Pipeline` at 64 x 64 pixels, small in every dimension.

Every class and every conditioning path is SD3.5-medium's own (two CLIP encoders, T5 or zeros in its place, joint
attention with a second attention in the first blocks, normalised queries and keys, flow matching, 16 latent channels
with a shift and a scale); only widths and depths differ, and the shift of the noise levels: SD3's 3 is for a million
pixels, of which noise hides the large shapes late; here it is 1.
"""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffalign.shapes.captions import vocabulary
from diffalign.shapes.pipeline import PROMPT_LENGTH, RESOLUTION, build_text_encoder
from diffalign.shapes.tokenizer import build_tokenizer

LATENT_CHANNELS = 16
_TEXT_WIDTHS = (64, 96)
_TEXT_WIDTH = sum(_TEXT_WIDTHS)  # also T5's: CLIP's states are padded to it


def build_vae() -> AutoencoderKL:
    """Build the image autoencoder: 64 x 64 pixels to 16 x 16 x 16 latents."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(layers: int = 5, heads: int = 4) -> SD3Transformer2DModel:
    """Build the denoiser: 8 x 8 tokens of 2 x 2 latents, heads of 32 channels."""
    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=_TEXT_WIDTH,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=_TEXT_WIDTH,
        pos_embed_max_size=RESOLUTION // 8,
        dual_attention_layers=tuple(range(layers // 2)),
        qk_norm="rms_norm",
    )


def build_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """Build a T5 encoder over the words of the grammar, with its tokenizer."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *("\u2581" + word for word in vocabulary())]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[*((piece, -2.0) for piece in pieces), *letters], extra_ids=0, model_max_length=512)
    shape = {
        "d_model": _TEXT_WIDTH,
        "d_kv": 32,
        "d_ff": 2 * _TEXT_WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)), tokenizer


def build_pipeline(seed: int, t5: bool = False) -> StableDiffusion3Pipeline:
    """Build the whole pipeline with random weights drawn from `seed`; without T5 its 256 tokens are zeros."""
    torch.manual_seed(seed)
    first, second = build_tokenizer(PROMPT_LENGTH), build_tokenizer(PROMPT_LENGTH, pad_token="!")
    encoder, tokenizer = build_t5() if t5 else (None, None)
    return StableDiffusion3Pipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(_TEXT_WIDTHS[0], "quick_gelu", True, first),
        text_encoder_2=build_text_encoder(_TEXT_WIDTHS[1], "gelu", True, second),
        text_encoder_3=encoder,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=tokenizer,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
