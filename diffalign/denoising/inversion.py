"""Inversion: noisy latents that a network itself maps back to a given image, instead of random ones.

DDIM inversion runs the sampler's equation upwards from x0. From a level with abar = s to one with abar = d,

    x_d = sqrt(d) * (x_s - sqrt(1 - s) * e) / sqrt(s) + sqrt(1 - d) * e,    e = noise predicted at x_s    (DDIM, Eq. 12)

and the target that belongs to the result is tau = (xt - alpha * x0) / sigma, for which the one-step estimate of x0 is
exact (InPO, arXiv 2503.18454). ReNoise (Garibi et al. 2024, 2403.14602) replaces e by the mean of e and of predictions
at the point just found; SmPO (2506.02698) takes one such iteration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.denoising.noising import DenoisingBatch, per_image, with_noise
from diffalign.denoising.paths import DDPMPath
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
        grid: of the exact mode. "stride": levels T/n apart, the last step shorter; few evaluations for small t, 5.5 of
            10 on average. "proportional": num_steps equal parts of [0, t].
        eta: fresh noise added in every step, as a share of DDPM's. InPO's code: 0.1, not mentioned in the paper.
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

    timesteps: Tensor  # [N,S] int64, source levels as the network is told
    destinations: Tensor  # [N,S] int64
    source: Tensor  # [N,S] abar of the source level, float32; 1 for the clean image
    destination: Tensor  # [N,S]
    count: Tensor  # [N] int64


def plan(path: DDPMPath, timesteps: Tensor, how: Inversion) -> Hops:
    """Lay out the steps that lead N images to their timesteps [N].

    Raises:
        ConfigError: more steps than noise levels.
    """
    total, device = path.num_train_timesteps, timesteps.device
    if how.num_steps > total:
        raise ConfigError(
            f"inversion.num_steps must be at most {total}, the number of noise levels, got {how.num_steps}."
        )
    levels = _official_levels if how.mode == "official_compat" else _exact_levels
    ladders = [levels(int(t), total, how) for t in timesteps.tolist()]
    count = torch.tensor([len(ladder) - 1 for ladder in ladders])
    steps = int(count.max()) if len(ladders) else 0
    ladders = [ladder + ladder[-1:] * (steps + 1 - len(ladder)) for ladder in ladders]
    grid = torch.tensor(ladders, dtype=torch.int64).reshape(len(ladders), steps + 1).to(device)
    alpha, _ = path.alpha_sigma(grid.clamp(min=0).flatten())
    abar = alpha.square().view_as(grid)
    if how.mode == "exact":
        abar = torch.where(grid == CLEAN, torch.ones_like(abar), abar)
        grid = grid.clamp(min=0)
    return Hops(grid[:, :-1], grid[:, 1:], abar[:, :-1], abar[:, 1:], count.to(device))


CLEAN = -1  # the level of x0 itself, abar = 1: below timestep 0, which holds a little noise already


def _exact_levels(t: int, total: int, how: Inversion) -> list[int]:
    """Return the levels from the clean image to t, without repetitions."""
    if how.grid == "stride":
        inner = {round(k * total / how.num_steps) for k in range(1, how.num_steps)}
    else:
        inner = {round(k * t / how.num_steps) for k in range(1, how.num_steps)}
    return [CLEAN, *sorted(level for level in inner if 0 < level < t), t]


def _official_levels(t: int, total: int, how: Inversion) -> list[int]:
    """Return the levels of diffusers 0.20's inverse scheduler up to the first that is not below t, or its last."""
    stride = total // how.num_steps
    sources = [1 - stride, *(1 + k * stride for k in range(how.num_steps - 1))]
    used = [level for level in sources if level < t]
    return [*used, used[-1] + stride] if used else [max(t, 0)]


def invert(
    path: DDPMPath,
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
        source, destination = (_like(x, abar[rows, step]) for abar in (hops.source, hops.destination))
        here, there, part = hops.timesteps[rows, step], hops.destinations[rows, step], cond.select(rows)

        def noise_at(point: Tensor, fed: Tensor, source: Tensor = source, part: Any = part) -> Tensor:
            return _to_noise(path, point, network(point, fed, part), source)

        start = x[rows]
        predicted = [noise_at(start, here)]
        for _ in range(how.renoise_iterations):
            point = _ddim(start, predicted[-1], source, destination)
            at_source = how.renoise_at == "source"
            predicted.append(noise_at(point, here if at_source else there, source if at_source else destination))
        moved = _ddim(start, torch.stack(predicted).mean(0), source, destination)
        if how.eta > 0:
            assert fresh_noise is not None, "eta > 0 needs fresh noise"
            variance = (1 - source) / (1 - destination) * (1 - destination / source)
            moved = moved + how.eta * variance.clamp(min=0).sqrt() * fresh_noise(step)[rows]
        x[rows] = moved
    return x


def inverted(
    path: DDPMPath,
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
    alpha, sigma = (_like(x0, coefficient) for coefficient in path.alpha_sigma(repeated))
    return with_noise(path, x0, (xt - alpha * x0.float()) / sigma, repeated, xt=xt)


def _like(images: Tensor, values: Tensor) -> Tensor:
    """Return values [N] with trailing ones, to multiply images [N,...]."""
    return values.view(-1, *(1 for _ in images.shape[1:]))


def _ddim(x: Tensor, noise: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    """Move x from abar `source` to abar `destination` along the noise."""
    clean = (x - (1 - source).sqrt() * noise) / source.sqrt()
    return destination.sqrt() * clean + (1 - destination).sqrt() * noise


def _to_noise(path: DDPMPath, x: Tensor, pred: Tensor, abar: Tensor) -> Tensor:
    """Return the noise that a prediction at a level stands for: of v, sqrt(abar) * v + sqrt(1 - abar) * x."""
    if path.prediction_type == "epsilon":
        return pred
    return abar.sqrt() * pred + (1 - abar).sqrt() * x
