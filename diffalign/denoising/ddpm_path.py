"""The path of DDPM: variance-preserving, at whole timesteps, with a network that predicts the noise or v."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.denoising.densities import TimestepSampling
from diffalign.denoising.scheduler_config import check_choice
from diffalign.denoising.shifts import Shift
from diffalign.denoising.spread import spread
from diffalign.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # 1.x, 2.x and XL


class DDPMPath:
    """Follow the variance-preserving path of DDPM: alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    Args:
        alphas_cumprod: abar_t for t = 0..T-1 [T], in [0, 1] and not increasing.
        prediction_type: what the network predicts: "epsilon" (the noise) or "v_prediction".

    Raises:
        ConfigError: the table is not such a sequence, or the prediction type is another one.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        table = alphas_cumprod.detach().to("cpu", torch.float32)
        if not _is_falling(table):
            raise ConfigError(
                f"The noise schedule must be a sequence that falls from 1 towards 0; got shape {tuple(table.shape)}, "
                f"starting {table.flatten()[:3].tolist()}. Check the betas of the scheduler config."
            )
        self.alphas_cumprod = table
        self.prediction_type = prediction_type
        self._coefficients = {torch.device("cpu"): (table.sqrt(), (1 - table).sqrt())}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DDPMPath":
        """Build the path of a diffusers scheduler config (`scheduler/scheduler_config.json`).

        Reads `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`, `trained_betas`, `prediction_type` and
        `rescale_betas_zero_snr`; missing ones get the defaults of diffusers. Raises ConfigError for a schedule or a
        prediction type that is not supported.
        """
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, config.get("prediction_type", "epsilon"))

    @property
    def num_train_timesteps(self) -> int:
        """Return T, the number of noise levels."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of x0 and noise at int64 timesteps 0..T-1: [N] -> [N], [N] float32."""
        device = timesteps.device
        if device not in self._coefficients:
            alpha, sigma = self._coefficients[torch.device("cpu")]
            self._coefficients[device] = alpha.to(device), sigma.to(device)
        alpha, sigma = self._coefficients[device]
        # Unlike alpha[timesteps], index_select refuses a negative timestep instead of counting from the end.
        return alpha.index_select(0, timesteps), sigma.index_select(0, timesteps)

    def target_weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what x0 and noise are multiplied by in the target, [N] and [N]; None: the target is the noise.

        v = alpha * noise - sigma * x0: Salimans & Ho 2022 (2202.00512), appendix D.
        """
        if self.prediction_type == "epsilon":
            return None
        alpha, sigma = self.alpha_sigma(timesteps)
        return -sigma, alpha

    def to_x0(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latent that a prediction implies [N,...].

        epsilon: (xt - sigma * pred) / alpha, which is not finite where alpha is 0 (the last timestep of a
        zero-terminal-SNR schedule: pure noise says nothing about x0). v: alpha * xt - sigma * pred.
        """
        alpha, sigma = (spread(values, xt) for values in self.alpha_sigma(timesteps))
        if self.prediction_type == "epsilon":
            return (xt.float() - sigma * pred.float()) / alpha
        return alpha * xt.float() - sigma * pred.float()

    def to_epsilon(self, xt: Tensor, pred: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise that a prediction implies [N,...]: itself, or of v: alpha * pred + sigma * xt."""
        if self.prediction_type == "epsilon":
            return pred.float()
        alpha, sigma = (spread(values, xt) for values in self.alpha_sigma(timesteps))
        return alpha * pred.float() + sigma * xt.float()

    def min_snr(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, gamma) / SNR [N] for epsilon and min(SNR, gamma) / (SNR + 1) for v, float32."""
        alpha, sigma = self.alpha_sigma(timesteps)
        signal, noise = alpha.square(), sigma.square()
        if self.prediction_type == "epsilon":
            return (gamma * noise / signal).clamp(max=1.0)  # a signal of 0 gives inf, clamped to the limit 1
        return torch.minimum(signal, gamma * noise) / (signal + noise)

    def timesteps_at(
        self, fraction: Tensor, low: int = 0, high: int | None = None, sampling: TimestepSampling | None = None
    ) -> Tensor:
        """Return the quantiles at fractions [B] float64 in [0, 1) of the timesteps low..high-1: [B] int64.

        All timesteps alike by default, as in Diffusion-DPO and its descendants. Raises ConfigError for a shift: it
        moves the levels of a flow path, and a schedule of betas has its own way to be noisier.
        """
        high = self.num_train_timesteps if high is None else high
        sampling = TimestepSampling() if sampling is None else sampling
        if sampling.shift != Shift():
            raise ConfigError(
                f"This model's noise schedule is that of DDPM, which knows no shift of noise levels ({sampling.shift})."
                " Leave the shift out; denoising.timestep_low draws noisier timesteps."
            )
        if sampling == TimestepSampling():
            return low + (fraction * (high - low)).to(torch.int64)
        drawn = sampling.density.timesteps(fraction, low, high, sampling.shift, self.num_train_timesteps)
        return drawn.to(torch.int64).clamp(low, high - 1)

    def ode_level(self, timesteps: Tensor) -> Tensor:
        """Return abar, in which DDIM's equation is written, at timesteps of any shape, float32; 1 below timestep 0."""
        alpha, _ = self.alpha_sigma(timesteps.clamp(min=0).flatten())
        abar = alpha.square().view_as(timesteps)
        return torch.where(timesteps < 0, torch.ones_like(abar), abar)

    def ode_direction(self, x: Tensor, pred: Tensor, level: Tensor) -> Tensor:
        """Return the noise that a prediction at abar `level` stands for: of v, sqrt(abar) * v + sqrt(1 - abar) * x."""
        if self.prediction_type == "epsilon":
            return pred
        return level.sqrt() * pred + (1 - level).sqrt() * x

    def ode_step(self, x: Tensor, direction: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        """Move x from abar `source` to abar `destination` along the noise (Song et al. 2020, 2010.02502, Eq. 12)."""
        clean = (x - (1 - source).sqrt() * direction) / source.sqrt()
        return destination.sqrt() * clean + (1 - destination).sqrt() * direction

    def require_ddpm(self, what: str, instead: str) -> None:
        """Do nothing: this is that path."""

    def require_flow(self, what: str, instead: str) -> None:
        """Raise ConfigError: `what` is defined on a flow path alone; `instead` says what to do."""
        raise ConfigError(
            f"{what} is defined for flow models; this one follows a noise schedule of DDPM, whose sampler leads from "
            f"the noise to the picture along a curve. {instead}"
        )

    def identity(self) -> bytes:
        """Return the schedule as bytes, for the names of caches."""
        return self.alphas_cumprod.numpy().tobytes()


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) [T] so that the last level is pure noise and the first one stays.

    Algorithm 1 of Lin et al. 2023 (2305.08891), on abar itself: diffusers goes by way of the betas, which rounds twice
    more (their tables differ by less than 2e-6). Applying it again changes nothing.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()


def _is_falling(table: Tensor) -> bool:
    """Tell whether a table is a non-empty, non-increasing sequence in [0, 1]; NaN is not."""
    if table.ndim != 1 or not len(table):
        return False
    return bool(((table >= 0) & (table <= 1)).all() and (table.diff() <= 0).all())


def _linear(start: float, end: float, count: int) -> Tensor:
    """Return betas in equal steps: DDPM."""
    return torch.linspace(start, end, count, dtype=torch.float32)


def _scaled_linear(start: float, end: float, count: int) -> Tensor:
    """Return betas whose square roots are in equal steps: latent diffusion, hence every Stable Diffusion."""
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32).square()


def _squared_cosine(start: float, end: float, count: int) -> Tensor:
    """Return the betas of a squared-cosine abar, at most 0.999 (Nichol & Dhariwal 2021, Eq. 17); ends are ignored."""
    time = torch.arange(count + 1, dtype=torch.float64) / count
    abar = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999).float()


_BETA_SCHEDULES = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _squared_cosine}


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Return the betas of a diffusers scheduler config [T]."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    schedule = config.get("beta_schedule", "linear")
    check_choice("beta_schedule", schedule, tuple(_BETA_SCHEDULES))
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    return _BETA_SCHEDULES[schedule](start, end, config.get("num_train_timesteps", 1000))
