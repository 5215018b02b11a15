"""Noise paths: how a clean latent turns into noise, and what the network is asked to predict on the way.

xt = alpha * x0 + sigma * noise, and the target is another mixture of the two. A path knows its coefficients, what
follows from a prediction, which timesteps there are, and its sampler's equation; nothing outside the files of paths
asks which one it is. Results are float32 whatever the inputs are.

    path        alpha       sigma           target                        timesteps
    DDPMPath    sqrt(abar)  sqrt(1 - abar)  noise, or v of Salimans & Ho  int64 in 0..T-1
    FlowPath    1 - s       s               noise - x0                    float32 in (0, 1000], s = t / 1000
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from diffalign.denoising.ddpm_path import STABLE_DIFFUSION, DDPMPath, zero_terminal_snr
from diffalign.denoising.densities import TimestepSampling
from diffalign.denoising.flow_path import FlowPath
from diffalign.denoising.scheduler_config import is_flow
from diffalign.denoising.spread import spread
from diffalign.errors import ConfigError

__all__ = [
    "STABLE_DIFFUSION",
    "DDPMPath",
    "FlowPath",
    "NoisePath",
    "add_noise",
    "path_of",
    "target",
    "to_epsilon",
    "to_x0",
    "zero_terminal_snr",
]


class NoisePath(Protocol):
    """What the rest of the package knows of a path."""

    @property
    def num_train_timesteps(self) -> int:
        """Return T: timesteps lie in 0..T."""

    @property
    def prediction_type(self) -> str:
        """Return what the network predicts, in the words of diffusers' schedulers."""

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of x0 and noise: [N] -> [N], [N] float32."""

    def target_weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what x0 and noise are multiplied by in the target: [N] -> [N], [N]; None: the target is the noise."""

    def to_x0(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latent that a prediction implies [N,...]."""

    def to_epsilon(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that a prediction implies [N,...]."""

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the weights of `weighting.min_snr`: [N] -> [N]."""

    def timesteps_at(
        self, fraction: Tensor, low: int = 0, high: int | None = None, sampling: TimestepSampling | None = None
    ) -> Tensor:
        """Return quantiles of the timesteps within a window, in the type a network is fed: [B] in [0, 1) -> [B]."""

    def ode_level(self, timesteps: Tensor) -> Tensor:
        """Return the coordinate of the sampler's equation at timesteps; below 0 lies the clean latent."""

    def ode_direction(self, x: Tensor, pred: Tensor, level: Tensor) -> Tensor:
        """Return what the equation is integrated along, given a prediction at x [N,...] and its level."""

    def ode_step(self, x: Tensor, direction: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        """Return x [N,...] moved from one level to another along a direction."""

    def require_ddpm(self, what: str, instead: str) -> None:
        """Raise ConfigError on a path that is not DDPM's, for what is defined on that alone."""

    def require_flow(self, what: str, instead: str) -> None:
        """Raise ConfigError on a path that is not straight, for what is defined on a straight one alone."""

    def identity(self) -> bytes:
        """Return what noising depends on, for the names of caches."""


def path_of(config: Mapping[str, Any]) -> NoisePath:
    """Return the path of a diffusers scheduler config (`scheduler/scheduler_config.json`).

    Raises:
        ConfigError: a path, or a setting of one, that is not supported.
    """
    if "sigma_data" in config:
        raise ConfigError(
            "Unsupported noise scheduler: sigma_data says that this model is preconditioned as in EDM, on a path that "
            "is neither DDPM's nor that of flow matching."
        )
    return FlowPath.from_config(config) if is_flow(config) else DDPMPath.from_config(config)


def add_noise(path: NoisePath, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return xt = alpha * x0 + sigma * noise [N,...]."""
    alpha, sigma = (spread(values, x0) for values in path.alpha_sigma(timesteps))
    return alpha * x0.float() + sigma * noise.float()


def target(path: NoisePath, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict [N,...]: the noise, v = alpha * noise - sigma * x0, or noise - x0."""
    weights = path.target_weights(timesteps)
    if weights is None:
        return noise.float()
    of_x0, of_noise = (spread(values, x0) for values in weights)
    return of_noise * noise.float() + of_x0 * x0.float()


def to_x0(path: NoisePath, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean latent that a prediction implies [N,...]."""
    return path.to_x0(xt, pred, timesteps)


def to_epsilon(path: NoisePath, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noise that a prediction implies [N,...]."""
    return path.to_epsilon(xt, pred, timesteps)
