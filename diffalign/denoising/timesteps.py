"""Which noise level an example is trained at."""

import torch
from torch import Tensor

from diffalign.denoising.draws import uniform
from diffalign.denoising.paths import DDPMPath
from diffalign.errors import ConfigError


def sample_timesteps(
    path: DDPMPath, seed: int, step: int, example_ids: Tensor, low: int = 0, high: int | None = None
) -> Tensor:
    """Draw a timestep uniformly from low..high-1 for every example: ids [B] int64 -> [B] int64.

    `high` is T if not given: every noise level alike, as in Diffusion-DPO and its descendants. Raises ConfigError
    unless 0 <= low < high <= T.
    """
    high = path.num_train_timesteps if high is None else high
    if not 0 <= low < high <= path.num_train_timesteps:
        raise ConfigError(
            f"Timesteps must satisfy 0 <= low < high <= {path.num_train_timesteps}, got low {low} and high {high}."
        )
    fraction = uniform(seed, step, example_ids, stream="timesteps")
    return low + (fraction * (high - low)).to(torch.int64)
