"""One step of stochastic DDIM (Song et al. 2020, arXiv 2010.02502) and its probability.

With abar of the levels t and p < t and eta > 0,

    std^2 = eta^2 * (1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p)
    mean  = sqrt(abar_p) * x0 + sqrt(1 - abar_p - std^2) * eps,      x_p = mean + std * z

and log p(x_p | x_t) is *averaged* over C, H, W. DDPO, D3PO, SPO and LPO share these lines, and their beta, clip
range and learning rate are calibrated for the average: a sum would be 16,384 times as large at 64 x 64 x 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.denoising.paths import NoisePath, to_epsilon, to_x0
from diffalign.denoising.spread import spread
from diffalign.errors import ConfigError

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (xt, timesteps, cond) -> pred

# Flow matching has no stochastic step of its own: an SDE of the same marginals is a method's choice (Flow-GRPO, ...).
_DDIM = (
    "Sampling by DDIM steps, as spo, d3po, ddpo, dpok, refl, draft and alignprop do,",
    "Choose an objective of pairs, single images or lists (objective.name: dpo), or a model of the SD family.",
)


@dataclass(frozen=True, eq=False)
class Ladder:
    """Hold the levels a sampler visits, noisiest first."""

    timesteps: Tensor  # [S] int64, where each step starts
    previous: Tensor  # [S] int64, where it ends; 0 after the last, which is not noise-free

    def __len__(self) -> int:
        return len(self.timesteps)


def ladder(path: NoisePath, num_inference_steps: int) -> Ladder:
    """Return the levels of the published samplers: steps of T // S, leading spacing, offset 1 (951, 901, ..., 51, 1).

    A step goes to max(t - T // S, 0); the last one therefore ends at timestep 0, not at the clean image, and its std is
    not 0 (0.0206 for S = 20). All repositories of the SD family do so.

    Where the schedule ends in pure noise only its last level is what sampling starts from, so that the spacing is
    trailing there (999, 949, ..., 99, 49), as Lin et al. 2023 (2305.08891) ask for; the last step ends at 0 again.

    Raises:
        ConfigError: fewer than 1 step, more than half as many as the schedule has levels, or another path than DDPM's.
    """
    path.require_ddpm(*_DDIM)
    total = path.num_train_timesteps
    if not 1 <= num_inference_steps <= total // 2:
        raise ConfigError(
            f"num_inference_steps must be between 1 and {total // 2} for {total} noise levels, got "
            f"{num_inference_steps}. 20 is usual."
        )
    if ends_in_noise(path):
        timesteps = (torch.arange(num_inference_steps, 0, -1) * (total / num_inference_steps)).round().long() - 1
        return Ladder(timesteps, torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.int64)]))
    stride = total // num_inference_steps
    timesteps = torch.arange(num_inference_steps - 1, -1, -1) * stride + 1
    return Ladder(timesteps, (timesteps - stride).clamp(min=0))


def ends_in_noise(path: NoisePath) -> bool:
    """Tell whether the last level of a DDPM path holds nothing of x0: a zero terminal signal-to-noise ratio."""
    alpha, _ = path.alpha_sigma(torch.tensor([path.num_train_timesteps - 1]))
    return alpha.item() == 0.0


@dataclass(frozen=True, eq=False)
class StepDistribution:
    """Hold the Gaussians p(x_p | x_t) of N steps."""

    mean: Tensor  # [N,...] float32, with gradient if the prediction has one
    std: Tensor  # [N]
    x0: Tensor  # [N,...], the one-step estimate of the clean latent

    def sample(self, noise: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return mean + std * noise [N,...] as it is stored: rounded to `dtype`, float32.

        The log-probability of what is stored is the same when it is computed again; of the unrounded sample it is not.
        """
        return (self.mean + spread(self.std, self.mean) * noise.float()).to(dtype).float()

    def log_prob(self, x_prev: Tensor) -> Tensor:
        """Return log p(x_prev | x_t) averaged over C, H, W: [N] float32; no gradient flows to `x_prev`."""
        residual = (x_prev.detach().float() - self.mean) / spread(self.std, self.mean)
        return -0.5 * residual.square().flatten(1).mean(1) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def select(self, rows: Tensor) -> "StepDistribution":
        """Return some of the steps."""
        return StepDistribution(self.mean[rows], self.std[rows], self.x0[rows])


def ddim_step(
    path: NoisePath, xt: Tensor, pred: Tensor, timesteps: Tensor, previous: Tensor, eta: float = 1.0
) -> StepDistribution:
    """Return where a step from xt [N,...] goes: timesteps, previous [N] int64, pred as the path says.

    std is computed from differences of 1 - abar, which float32 holds better than abar near 1. A step from pure noise
    (abar_t = 0) has std eta * sqrt(1 - abar_p) and needs a prediction of v. Raises ConfigError for another path than
    DDPM's.
    """
    path.require_ddpm(*_DDIM)
    (signal_t, noise_t), (signal_p, noise_p) = path.alpha_sigma(timesteps), path.alpha_sigma(previous)
    share = (noise_t.square() - noise_p.square()) / (signal_p * noise_t).square()
    share = share.where(signal_t > 0, 1.0)  # from pure noise exactly: abar_p is small there, and its rounding is not
    variance = eta**2 * share * noise_p.square()
    direction = (noise_p.square() - variance).clamp(min=0).sqrt()
    x0, eps = to_x0(path, xt, pred, timesteps), to_epsilon(path, xt, pred, timesteps)
    return StepDistribution(spread(signal_p, x0) * x0 + spread(direction, x0) * eps, variance.sqrt(), x0)


def guided(network: Network, xt: Tensor, timesteps: Tensor, cond: Any, empty: Any, guidance_scale: float) -> Tensor:
    """Return pred(empty) + guidance_scale * (pred(cond) - pred(empty)) [N,...] float32, in one pass of 2N.

    `empty` is the conditioning of one empty prompt. Gradients flow through both branches, as in the published codes. A
    scale of 1 is the conditional prediction alone, in a pass of N.
    """
    if guidance_scale == 1.0:
        return network(xt, timesteps, cond).float()
    unconditional = empty.select(torch.zeros(len(xt), dtype=torch.int64, device=xt.device))
    both = type(cond).cat([unconditional, cond])
    without, with_prompt = network(torch.cat([xt, xt]), torch.cat([timesteps, timesteps]), both).float().chunk(2)
    return without + guidance_scale * (with_prompt - without)
