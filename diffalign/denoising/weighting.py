"""Weights of the noise levels: factors on the errors before an objective sees them."""

from torch import Tensor

from diffalign.denoising.paths import NoisePath


def min_snr(path: NoisePath, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR-gamma weights of Hang et al. 2023 (2303.09556): timesteps [N] -> [N] float32.

    With SNR = alpha^2 / sigma^2: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v prediction and
    sigma^2 * min(SNR, gamma) for the velocity of a flow path, so that every level counts like an x0 error clipped at
    gamma. In a DPO logit this is the omega(lambda_t) of Eq. 14.
    """
    return path.min_snr(timesteps, gamma)
