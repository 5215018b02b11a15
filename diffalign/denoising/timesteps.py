"""Which noise level an example is trained at."""

from torch import Tensor

from diffalign.denoising.densities import TimestepSampling
from diffalign.denoising.draws import uniform
from diffalign.denoising.paths import NoisePath
from diffalign.errors import ConfigError


def sample_timesteps(
    path: NoisePath,
    seed: int,
    step: int,
    example_ids: Tensor,
    low: int = 0,
    high: int | None = None,
    sampling: TimestepSampling | None = None,
) -> Tensor:
    """Draw a timestep for every example: ids [B] int64 -> [B], int64 of DDPM and float32 of a flow path.

    They come from low..high-1 of DDPM, and from between low and high of a flow path, where they are 1000 * sigma after
    the shift. `high` is T if not given.

    Args:
        sampling: density and shift; None: all noise levels alike, as in Diffusion-DPO and its descendants.

    Raises:
        ConfigError: not 0 <= low < high <= T, no timestep that the density gives lies there, or a shift of DDPM.
    """
    high = path.num_train_timesteps if high is None else high
    if not 0 <= low < high <= path.num_train_timesteps:
        raise ConfigError(
            f"Timesteps must satisfy 0 <= low < high <= {path.num_train_timesteps}, got low {low} and high {high}."
        )
    fraction = uniform(seed, step, example_ids, stream="timesteps")
    return path.timesteps_at(fraction, low, high, sampling)
