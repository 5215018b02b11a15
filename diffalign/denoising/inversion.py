"""Inversion: noisy latents that a network itself maps back to a given image, instead of random ones.

DDIM inversion runs the sampler's equation upwards from x0. From a level with abar = s to one with abar = d,

    x_d = sqrt(d) * (x_s - sqrt(1 - s) * e) / sqrt(s) + sqrt(1 - d) * e,    e = noise predicted at x_s    (DDIM, Eq. 12)

and the target that belongs to the result is tau = (xt - alpha * x0) / sigma, for which the one-step estimate of x0 is
exact (InPO, arXiv 2503.18454). ReNoise (Garibi et al. 2024, 2403.14602) replaces e by the mean of e and of predictions
at the point just found; SmPO (2506.02698) takes one such iteration.

On a flow path the sampler's equation is dx = v ds. It is run upwards from s = 0 in Euler's steps, which are DDIM's with
other coefficients (both keep the implied x0 and noise); v takes the place of e, and the target is (xt - x0) / s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.denoising.noising import DenoisingBatch, per_image, with_noise
from diffalign.denoising.paths import NoisePath
from diffalign.denoising.spread import spread
from diffalign.errors import ConfigError

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (xt, timesteps, cond) -> pred, without gradient


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Say how latents are inverted.

    Args:
        num_steps: levels of the whole schedule, >= 1. The authors of InPO and SmPO: 10; SmPO for SD1.5: 5.
        mode: "exact" ends every image on its own timestep. "official_compat" is what the authors' code does under
            diffusers 0.20: the grid 1, 1 + T/n, ... with a first step at a negative timestep, ending on the first level
            not below t although network and target use t. Its noise is up to 6.5 times too large (t = 2, n = 10).
            Of DDPM only.
        grid: of the exact mode. "stride": levels T/n apart, the last step shorter; few evaluations for small t, 5.5 of
            10 on average. "proportional": num_steps equal parts of [0, t].
        eta: fresh noise added in every step, as a share of DDPM's. InPO's code: 0.1, not mentioned in the paper. 0
            on a flow path, whose equation has no noise.
        renoise_iterations: 0 is DDIM inversion. SmPO: 1; each costs as much as the inversion itself.
        renoise_at: timestep of the extra evaluations: "source" (SmPO's code) or "destination" (ReNoise).

    Raises:
        ConfigError: a value out of range.
    """

    num_steps: int = 10
    mode: Literal["exact", "official_compat"] = "exact"
    grid: Literal["stride", "proportional"] = "stride"
    eta: float = 0.0
    renoise_iterations: int = 0
    renoise_at: Literal["source", "destination"] = "source"

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.renoise_iterations < 0 or self.eta < 0:
            raise ConfigError(
                f"An inversion needs num_steps >= 1, renoise_iterations >= 0 and eta >= 0, got {self.num_steps}, "
                f"{self.renoise_iterations} and {self.eta}."
            )


@dataclass(frozen=True)
class Hops:
    """Hold the steps of N images, padded to S; step s of image i is made if s < count[i]."""

    timesteps: Tensor  # [N,S] source levels as the network is told, int64 of DDPM, float32 of a flow path
    destinations: Tensor  # [N,S] of the same type
    source: Tensor  # [N,S] source levels in the path's `ode_level`, float32: abar of DDPM, 1 for the clean image
    destination: Tensor  # [N,S]
    count: Tensor  # [N] int64


def plan(path: NoisePath, timesteps: Tensor, how: Inversion) -> Hops:
    """Lay out the steps that lead N images to their timesteps [N].

    Raises:
        ConfigError: more steps than noise levels, or what a flow path does not have.
    """
    if how.mode == "official_compat":
        path.require_ddpm('inversion.mode "official_compat"', 'Choose "exact".')
    if how.eta > 0:
        path.require_ddpm("Fresh noise in every step of an inversion", "Set inversion.eta to 0.")
    total, device = path.num_train_timesteps, timesteps.device
    if how.num_steps > total:
        raise ConfigError(
            f"inversion.num_steps must be at most {total}, the number of noise levels, got {how.num_steps}."
        )
    levels = _official_levels if how.mode == "official_compat" else _exact_levels
    ladders = [levels(t, total, how) for t in timesteps.tolist()]
    count = torch.tensor([len(ladder) - 1 for ladder in ladders])
    steps = int(count.max()) if len(ladders) else 0
    ladders = [ladder + ladder[-1:] * (steps + 1 - len(ladder)) for ladder in ladders]
    grid = torch.tensor(ladders, dtype=timesteps.dtype).reshape(len(ladders), steps + 1).to(device)
    if how.mode == "exact":
        level, grid = path.ode_level(grid), grid.clamp(min=0)
    else:
        level = path.ode_level(grid.clamp(min=0))
    return Hops(grid[:, :-1], grid[:, 1:], level[:, :-1], level[:, 1:], count.to(device))


CLEAN = -1  # the level of x0 itself: below timestep 0, which holds a little noise already in DDPM


def _exact_levels(t: float, total: int, how: Inversion) -> list[float]:
    """Return the levels from the clean image to t, without repetitions; whole ones if t is whole."""
    end = total if how.grid == "stride" else t
    nearest = round if isinstance(t, int) else float
    inner = {nearest(k * end / how.num_steps) for k in range(1, how.num_steps)}
    return [CLEAN, *sorted(level for level in inner if 0 < level < t), t]


def _official_levels(t: int, total: int, how: Inversion) -> list[int]:
    """Return the levels of diffusers 0.20's inverse scheduler up to the first that is not below t, or its last."""
    stride = total // how.num_steps
    sources = [1 - stride, *(1 + k * stride for k in range(how.num_steps - 1))]
    used = [level for level in sources if level < t]
    return [*used, used[-1] + stride] if used else [max(t, 0)]


def invert(
    path: NoisePath,
    x0: Tensor,
    timesteps: Tensor,
    network: Network,
    cond: Any,
    how: Inversion,
    fresh_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Invert N images to their timesteps: x0 [N,...], timesteps [N], cond of N -> xt [N,...] float32.

    All images take their s-th step in one batch, whatever its levels; an image that has arrived is not evaluated again.

    Args:
        network: predicts what the path says, at any mix of timesteps, without gradient.
        cond: offers `select(indices)`.
        fresh_noise: standard normal numbers [N,...] of step s, needed if how.eta > 0.
    """
    hops, x = plan(path, timesteps, how), x0.float().clone()
    for step in range(hops.timesteps.shape[1]):
        rows = (hops.count > step).nonzero().squeeze(1)
        source, destination = (spread(level[rows, step], x) for level in (hops.source, hops.destination))
        here, there, part = hops.timesteps[rows, step], hops.destinations[rows, step], cond.select(rows)

        def direction_at(point: Tensor, fed: Tensor, level: Tensor = source, part: Any = part) -> Tensor:
            return path.ode_direction(point, network(point, fed, part), level)

        start = x[rows]
        predicted = [direction_at(start, here)]
        for _ in range(how.renoise_iterations):
            point = path.ode_step(start, predicted[-1], source, destination)
            at_source = how.renoise_at == "source"
            predicted.append(direction_at(point, here if at_source else there, source if at_source else destination))
        moved = path.ode_step(start, torch.stack(predicted).mean(0), source, destination)
        if how.eta > 0:
            assert fresh_noise is not None, "eta > 0 needs fresh noise"
            variance = (1 - source) / (1 - destination) * (1 - destination / source)
            moved = moved + how.eta * variance.clamp(min=0).sqrt() * fresh_noise(step)[rows]
        x[rows] = moved
    return x


def inverted(
    path: NoisePath,
    x0: Tensor,
    timesteps: Tensor,
    seed: int,
    step: int,
    example_ids: Tensor,
    *,
    network: Network,
    cond: Any,
    how: Inversion,
) -> DenoisingBatch:
    """Pose the denoising problems of inverted images: x0 [k*B,...], timesteps [B], ids [B], cond of k*B."""
    repeated = timesteps.repeat(len(x0) // len(example_ids)).to(x0.device)

    def fresh_noise(hop: int) -> Tensor:
        return per_image(seed, step, example_ids, x0, stream=f"inversion_{hop}").to(x0.device)

    xt = invert(path, x0, repeated, network, cond, how, fresh_noise)
    alpha, sigma = (spread(coefficient, x0) for coefficient in path.alpha_sigma(repeated))
    return with_noise(path, x0, (xt - alpha * x0.float()) / sigma, repeated, xt=xt)
