"""Time densities: how often training meets each noise level, before levels are shifted.

A density is given by its quantiles: one uniform number an example makes a level, so draws stay keyed by example, and a
window of timesteps needs no rejection: the numbers are taken from between the probabilities of its ends.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffalign.denoising.shifts import Shift
from diffalign.errors import ConfigError

_SMALLEST = 2.0**-54  # in the place of a uniform number of 0, whose logit-normal quantile is not finite


class Density(Protocol):
    """Say how timesteps are distributed."""

    def timesteps(self, fraction: Tensor, low: float, high: float, shift: Shift, total: int) -> Tensor:
        """Return the quantiles at fractions [B] float64 in [0, 1) of timesteps within low..high of 0..total, float64.

        Raises ConfigError if no timestep can fall there.
        """


class Levels(ABC):
    """Base of the densities of levels u in (0, 1), which a shift then moves: subclasses are frozen dataclasses."""

    @abstractmethod
    def quantile(self, fraction: Tensor) -> Tensor:
        """Return the levels below which fractions in (0, 1) of the draws lie, float64."""

    @abstractmethod
    def cdf(self, level: float) -> float:
        """Return the fraction of draws below a level in (0, 1)."""

    def timesteps(self, fraction: Tensor, low: float, high: float, shift: Shift, total: int) -> Tensor:
        """Return the quantiles of the shifted levels, times `total`, under the condition that they are in low..high."""
        first, last = (self._below(shift.inverse(end / total)) for end in (low, high))
        if not first < last:
            raise ConfigError(
                f"No timestep falls between {low:g} and {high:g} under the density {self} with {shift}: widen "
                "denoising.timestep_low and timestep_high, or change the density or the shift."
            )
        place = first + fraction.clamp(min=_SMALLEST) * (last - first)
        return total * shift(self.quantile(place))

    def _below(self, level: float) -> float:
        return float(level >= 1) if not 0 < level < 1 else self.cdf(level)


@dataclass(frozen=True)
class Uniform(Levels):
    """Draw all levels alike: Rectified flow, Linear-DPO, PNAPO."""

    def quantile(self, fraction: Tensor) -> Tensor:
        """Return the fractions themselves."""
        return fraction

    def cdf(self, level: float) -> float:
        """Return the level itself."""
        return level

    def __str__(self) -> str:
        return "uniform"


@dataclass(frozen=True)
class LogitNormal(Levels):
    """Draw u = sigmoid(mean + std * z) with z standard normal: Esser et al. 2024 (SD3, 2403.03206).

    Args:
        mean: > 0 towards noise.
        std: > 0.

    Raises:
        ConfigError: a value out of range.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigError(
                f"A logit-normal density needs a finite mean and std > 0, got {self.mean} and {self.std}."
            )

    def quantile(self, fraction: Tensor) -> Tensor:
        """Return sigmoid(mean + std * Phi^-1(fraction))."""
        return (self.mean + self.std * torch.special.ndtri(fraction)).sigmoid()

    def cdf(self, level: float) -> float:
        """Return Phi((logit(level) - mean) / std)."""
        deviation = (math.log(level) - math.log1p(-level) - self.mean) / self.std
        return math.erfc(-deviation / math.sqrt(2)) / 2

    def __str__(self) -> str:
        return f"logit_normal(mean {self.mean:g}, std {self.std:g})"


@dataclass(frozen=True)
class Mode(Levels):
    """Draw u = 1 - r - scale * (cos^2(pi r / 2) - 1 + r) with r uniform: Esser et al. 2024 (SD3, 2403.03206).

    Args:
        scale: > 0 favours levels in the middle, < 0 the ends; 0 is uniform, 1.29 the default of diffusers' scripts.
            From -1 to 2 / (pi - 2) = 1.75, where u falls with r.

    Raises:
        ConfigError: a scale out of range.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ConfigError(f"The scale of a mode density must be from -1 to 2 / (pi - 2) = 1.75, got {self.scale}.")

    def quantile(self, fraction: Tensor) -> Tensor:
        """Return the level at r = 1 - fraction."""
        rest = 1 - fraction
        return fraction - self.scale * ((rest * (math.pi / 2)).cos().square() - fraction)

    def cdf(self, level: float) -> float:
        """Return the fraction whose quantile this is, found by halving an interval."""
        below, above = 0.0, 1.0
        for _ in range(60):
            middle = (below + above) / 2
            rises = float(self.quantile(torch.tensor(middle, dtype=torch.float64))) < level
            below, above = (middle, above) if rises else (below, middle)
        return (below + above) / 2

    def __str__(self) -> str:
        return f"mode(scale {self.scale:g})"


@dataclass(frozen=True)
class FixedList:
    """Draw one of some timesteps, all alike and as they are given: no shift moves them.

    Args:
        values: what the network is told, from 0 to the path's number of timesteps (801, 694, 548, 338 for example).

    Raises:
        ConfigError: none, or one below 0.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(0 <= value < math.inf for value in self.values):
            raise ConfigError(f"A list of timesteps needs at least one, none below 0, got {list(self.values)}.")

    def timesteps(self, fraction: Tensor, low: float, high: float, shift: Shift, total: int) -> Tensor:
        """Return values of the list that lie within low..high, each for an equal share of the fractions."""
        inside = [value for value in self.values if low <= value <= min(high, total)]
        if not inside:
            raise ConfigError(
                f"None of the timesteps {list(self.values)} lies between {low:g} and {high:g}: change the list, or "
                "denoising.timestep_low and timestep_high."
            )
        values = torch.tensor(inside, dtype=torch.float64).to(fraction.device, non_blocking=True)
        return values[(fraction * len(inside)).long()]

    def __str__(self) -> str:
        return f"one of {', '.join(f'{value:g}' for value in self.values)}"


DENSITIES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "list": FixedList}


@dataclass(frozen=True)
class TimestepSampling:
    """Say how timesteps are drawn: a density of levels, and the shift that moves what it gives."""

    density: Density = field(default_factory=Uniform)
    shift: Shift = field(default_factory=Shift)

    def __str__(self) -> str:
        return str(self.density) if isinstance(self.density, FixedList) else f"{self.density}, {self.shift}"
