"""From clean latents to errors: noise paths, keyed randomness, noisings, inversion, frozen passes, the step."""

from diffalign.denoising.ddim import Ladder, StepDistribution, ddim_step, ends_in_noise, guided, ladder
from diffalign.denoising.densities import DENSITIES, FixedList, LogitNormal, Mode, TimestepSampling, Uniform
from diffalign.denoising.draws import normal, uniform
from diffalign.denoising.frozen import FrozenDenoiser, Predict
from diffalign.denoising.initial_noise import InitialNoise, draw_noises, require_noises
from diffalign.denoising.inversion import Inversion, invert, inverted
from diffalign.denoising.noising import (
    RANDOM_NOISINGS,
    DenoisingBatch,
    generating,
    image_stream,
    independent,
    shared,
)
from diffalign.denoising.paths import (
    STABLE_DIFFUSION,
    DDPMPath,
    FlowPath,
    NoisePath,
    add_noise,
    path_of,
    target,
    to_epsilon,
    to_x0,
    zero_terminal_snr,
)
from diffalign.denoising.shifts import Shift, flux2_mu, mu_by_tokens, shift_of, shifted, stretched
from diffalign.denoising.step import (
    DenoisingOutputs,
    denoising_step,
    drift,
    errors,
    list_errors,
    pair_errors,
    single_errors,
)
from diffalign.denoising.timesteps import sample_timesteps
from diffalign.denoising.transitions import Rollout, TransitionBatch, score_matching, transition_likelihoods
from diffalign.denoising.weighting import min_snr
from diffalign.vocabulary import GENERATING, INVERSIONS, NOISINGS

__all__ = [
    "DENSITIES",
    "GENERATING",
    "INVERSIONS",
    "NOISINGS",
    "RANDOM_NOISINGS",
    "STABLE_DIFFUSION",
    "DDPMPath",
    "DenoisingBatch",
    "DenoisingOutputs",
    "FixedList",
    "FlowPath",
    "FrozenDenoiser",
    "InitialNoise",
    "Inversion",
    "Ladder",
    "LogitNormal",
    "Mode",
    "NoisePath",
    "Predict",
    "Rollout",
    "Shift",
    "StepDistribution",
    "TimestepSampling",
    "TransitionBatch",
    "Uniform",
    "add_noise",
    "ddim_step",
    "denoising_step",
    "draw_noises",
    "drift",
    "ends_in_noise",
    "errors",
    "flux2_mu",
    "generating",
    "guided",
    "image_stream",
    "independent",
    "invert",
    "inverted",
    "ladder",
    "list_errors",
    "min_snr",
    "mu_by_tokens",
    "normal",
    "pair_errors",
    "path_of",
    "require_noises",
    "sample_timesteps",
    "score_matching",
    "shared",
    "shift_of",
    "shifted",
    "single_errors",
    "stretched",
    "target",
    "to_epsilon",
    "to_x0",
    "transition_likelihoods",
    "uniform",
    "zero_terminal_snr",
]
