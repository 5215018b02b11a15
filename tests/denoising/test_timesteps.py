"""Timesteps: uniform integers in the range asked for, keyed by example."""

import pytest
import torch
from scipy import stats

from diffalign.denoising import DDPMPath, sample_timesteps
from diffalign.errors import ConfigError

PATH = DDPMPath.from_config({"num_train_timesteps": 20})


@pytest.mark.parametrize(("low", "high"), [(0, None), (0, 1), (5, 12), (19, 20)])
def test_every_timestep_of_the_range_is_equally_likely(low, high):
    timesteps = sample_timesteps(PATH, 0, 3, torch.arange(20000), low=low, high=high)
    assert timesteps.dtype == torch.int64
    values, counts = timesteps.unique(return_counts=True)
    assert values.tolist() == list(range(low, high or 20))
    assert stats.chisquare(counts.numpy()).pvalue > 0.01 or len(values) == 1


def test_a_timestep_depends_on_seed_step_and_id_alone():
    ids = torch.arange(200)
    timesteps = sample_timesteps(PATH, 0, 3, ids)
    assert torch.equal(sample_timesteps(PATH, 0, 3, ids.flip(0)), timesteps.flip(0))
    assert torch.equal(sample_timesteps(PATH, 0, 3, ids[50:60]), timesteps[50:60])
    for other in (sample_timesteps(PATH, 1, 3, ids), sample_timesteps(PATH, 0, 4, ids)):
        assert (other == timesteps).float().mean() < 0.2  # one in 20 by chance


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (5, 5), (8, 3), (0, 21)])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(ConfigError, match=f"0 <= low < high <= 20, got low {low} and high {high}"):
        sample_timesteps(PATH, 0, 0, torch.arange(2), low=low, high=high)
