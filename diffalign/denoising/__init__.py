"""From clean latents to errors: noise paths, keyed randomness, noisings, frozen passes and the denoising step."""

from diffalign.denoising.draws import normal, uniform
from diffalign.denoising.frozen import FrozenDenoiser, Predict
from diffalign.denoising.noising import NOISINGS, DenoisingBatch, independent, shared, single
from diffalign.denoising.paths import DDPMPath, add_noise, target, to_x0, zero_terminal_snr
from diffalign.denoising.step import DenoisingOutputs, denoising_step, errors, pair_errors, single_errors
from diffalign.denoising.timesteps import sample_timesteps

__all__ = [
    "NOISINGS",
    "DDPMPath",
    "DenoisingBatch",
    "DenoisingOutputs",
    "FrozenDenoiser",
    "Predict",
    "add_noise",
    "denoising_step",
    "errors",
    "independent",
    "normal",
    "pair_errors",
    "sample_timesteps",
    "shared",
    "single",
    "single_errors",
    "target",
    "to_x0",
    "uniform",
    "zero_terminal_snr",
]
