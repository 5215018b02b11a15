"""The embedded pipeline, untrained: a real `StableDiffusionXLPipeline` at 64 x 64 pixels, small in every dimension.

Every class and every conditioning path is SDXL's own (two text encoders, pooled embedding, time ids, the scaled-linear
schedule); only widths and depths differ, so code that runs this runs SDXL. Prediction and schedule are those of its
fine-tunes with v-prediction and a zero terminal signal-to-noise ratio (`build_scheduler`).
"""

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.shapes.tokenizer import build_tokenizer

RESOLUTION = 64
PROMPT_LENGTH = 24
LATENT_CHANNELS = 4
_TEXT_WIDTHS = (64, 96)
_TIME_ID_WIDTH = 32  # of each of the six time ids


def build_vae() -> AutoencoderKL:
    """Build the image autoencoder: 64 x 64 pixels to 16 x 16 x 4 latents."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=RESOLUTION,
    )


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser with SDXL's block layout: no attention at the top level, more of it further down."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=sum(_TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=_TEXT_WIDTHS[1] + 6 * _TIME_ID_WIDTH,
    )


def build_text_encoder(width: int, activation: str, projection: bool, tokenizer) -> torch.nn.Module:
    """Build one of the two CLIP text encoders; SDXL reads the hidden states before the last layer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=PROMPT_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_epsilon_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL base's scheduler."""
    return EulerDiscreteScheduler(**_SCHEDULE, prediction_type="epsilon", timestep_spacing="leading", steps_offset=1)


def build_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's noise levels, rescaled to end in pure noise, which asks for v-prediction and trailing timesteps.

    SDXL's own last level lets the mean colour through, so that a model of so few pixels draws muddy backgrounds (Lin et
    al. 2023, 2305.08891). Fine-tunes of SDXL such as NoobAI's are made like this, from weights that predict epsilon.
    """
    return EulerDiscreteScheduler(
        **_SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def build_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """Build the whole pipeline with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    first, second = build_tokenizer(PROMPT_LENGTH), build_tokenizer(PROMPT_LENGTH, pad_token="!")
    return StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(_TEXT_WIDTHS[0], "quick_gelu", False, first),
        text_encoder_2=build_text_encoder(_TEXT_WIDTHS[1], "gelu", True, second),
        tokenizer=first,
        tokenizer_2=second,
        unet=build_unet(),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=False,  # the unconditional branch is the empty caption, as trained
        add_watermarker=False,
    )
