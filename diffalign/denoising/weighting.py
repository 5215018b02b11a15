"""Weights of the noise levels: factors on the errors before an objective sees them."""

import torch
from torch import Tensor

from diffalign.denoising.paths import DDPMPath


def min_snr(path: DDPMPath, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR-gamma weights of Hang et al. 2023 (2303.09556): timesteps [N] -> [N] float32.

    With SNR = alpha^2 / sigma^2: min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v prediction, so
    that every level counts like an x0 error clipped at gamma. In a DPO logit this is the omega(lambda_t) of Eq. 14.
    """
    alpha, sigma = path.alpha_sigma(timesteps)
    signal, noise = alpha.square(), sigma.square()
    if path.prediction_type == "epsilon":
        return (gamma * noise / signal).clamp(max=1.0)  # a signal of 0 gives inf, clamped to the limit 1
    return torch.minimum(signal, gamma * noise) / (signal + noise)
