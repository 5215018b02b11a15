"""The path of flow matching: a straight line from the clean latent to noise, at any level between."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.denoising.densities import TimestepSampling
from diffalign.denoising.scheduler_config import FLOW_PREDICTION, check_choice
from diffalign.denoising.spread import spread
from diffalign.errors import ConfigError

TIMESTEPS = 1000  # of all families: time is 1000 * sigma, and what a network takes instead is its family's business
LOWEST = 1e-3  # below, a latent holds nothing of the noise that float32 could give back


class FlowPath:
    """Follow the straight path of flow matching (Lipman et al. 2022, 2210.02747; Liu et al. 2022, 2209.03003):

        xt = (1 - s) * x0 + s * noise,    target v = noise - x0,    s = timestep / 1000 in (0, 1]

    Timesteps are float32 in (0, 1000]; 0, the clean latent, is where inversion starts. Which sign and which time a
    network has is settled in its family's `predict`: a prediction here means v.
    """  # fmt: skip

    num_train_timesteps = TIMESTEPS
    prediction_type = FLOW_PREDICTION

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlowPath":
        """Build the path of a diffusers scheduler config of flow matching; shifts are read by `shift_of`.

        Raises:
            ConfigError: another number of timesteps or prediction, or time that counts the other way.
        """
        check_choice("prediction_type", config.get("prediction_type", FLOW_PREDICTION), (FLOW_PREDICTION,))
        total = config.get("num_train_timesteps", TIMESTEPS)
        if total != TIMESTEPS:
            raise ConfigError(
                f"Unsupported num_train_timesteps {total} of the noise scheduler. A flow path counts time from 0 to "
                f"{TIMESTEPS}: set num_train_timesteps to {TIMESTEPS} in scheduler/scheduler_config.json."
            )
        if config.get("invert_sigmas"):
            raise ConfigError(
                "Unsupported invert_sigmas of the noise scheduler: its time counts from noise to data, as that of the "
                "video model Mochi. Choose a text-to-image model."
            )
        return cls()

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - s and s at timesteps in 0..1000: [N] -> [N], [N] float32.

        1000 - t is exact where it is small, and 1 - s of a rounded s would not be: near noise it lost 4 of 7 digits.
        """
        time = timesteps.float()
        return (TIMESTEPS - time) / TIMESTEPS, time / TIMESTEPS

    def target_weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what x0 and noise are multiplied by in the target: -1 [N] and 1 [N]."""
        one = torch.ones_like(timesteps, dtype=torch.float32)
        return -one, one

    def to_x0(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latent that a prediction implies [N,...]: xt - s * v."""
        _, sigma = self.alpha_sigma(timesteps)
        return xt.float() - spread(sigma, xt) * pred.float()

    def to_epsilon(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that a prediction implies [N,...]: xt + (1 - s) * v."""
        alpha, _ = self.alpha_sigma(timesteps)
        return xt.float() + spread(alpha, xt) * pred.float()

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return s^2 * min(SNR, gamma) = min((1 - s)^2, gamma * s^2) [N] float32, SNR = (1 - s)^2 / s^2.

        An error of v is one of x0 divided by s^2. v of DDPM has the same weight, with alpha^2 + sigma^2 = 1.
        """
        alpha, sigma = self.alpha_sigma(timesteps)
        return torch.minimum(alpha.square(), gamma * sigma.square())

    def timesteps_at(
        self, fraction: Tensor, low: float = 0, high: float | None = None, sampling: TimestepSampling | None = None
    ) -> Tensor:
        """Return the quantiles at fractions [B] float64 in [0, 1) of the timesteps in low..high: [B] float32.

        The window holds of what the network is told, after the shift. Raises ConfigError if it is empty.
        """
        sampling = TimestepSampling() if sampling is None else sampling
        high = TIMESTEPS if high is None else high
        drawn = sampling.density.timesteps(fraction, low, high, sampling.shift, TIMESTEPS)
        return drawn.float().clamp(max(low, LOWEST), high)

    def ode_level(self, timesteps: Tensor) -> Tensor:
        """Return s at timesteps of any shape, float32; 0 below timestep 0."""
        return timesteps.float().clamp(min=0) / TIMESTEPS

    def ode_direction(self, x: Tensor, pred: Tensor, level: Tensor) -> Tensor:
        """Return the velocity dx / ds: the prediction itself."""
        return pred

    def ode_step(self, x: Tensor, direction: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        """Move x from s `source` to s `destination` along the velocity: Euler's step, to noise or from it."""
        return x + (destination - source) * direction

    def require_ddpm(self, what: str, instead: str) -> None:
        """Raise ConfigError: `what` is defined on DDPM's path alone; `instead` says what to do."""
        raise ConfigError(f"{what} is defined for noise schedules of DDPM; this model follows a flow path. {instead}")

    def require_flow(self, what: str, instead: str) -> None:
        """Do nothing: this is one."""

    def identity(self) -> bytes:
        """Return what tells this path from others, for the names of caches."""
        return FLOW_PREDICTION.encode()
