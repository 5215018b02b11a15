"""The recipe of an embedded pipeline."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Hold the recipe of an embedded pipeline; the defaults made `assets/tiny-sdxl`."""

    images: int = 20_000
    vae_steps: int = 1_500
    vae_batch_size: int = 32
    vae_crop: int = 32  # pixels; the VAE is convolutional, and a quarter of the image costs a quarter
    vae_learning_rate: float = 3e-3
    decoder_steps: int = 5_000  # of the decoder alone, once the latents are settled
    decoder_learning_rate: float = 2e-3
    decoder_noise: float = 0.1  # largest noise added to a latent of unit variance meanwhile
    epsilon_steps: int = 5_000  # of the denoiser first, as SDXL was trained: outlines come sooner than from v alone
    epsilon_learning_rate: float = 5e-4
    denoiser_steps: int = 3_000
    denoiser_batch_size: int = 32
    denoiser_learning_rate: float = 6e-4
    denoiser_bf16: bool = True  # autocast, as always in the VAE; 1.6 times as fast for a UNet, slower for SD3's class
    wrong_captions: float = 0.3  # share of wrong captions meanwhile, an attribute (`confusion.py`)
    early_step: int = 500  # of these, at which its average is kept as another generator of pairs
    strong_steps: int = 700  # more, with captions that are right, from the base to a third generator
    strong_learning_rate: float = 3e-4
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    seed: int = 0
