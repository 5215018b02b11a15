"""Keyed randomness: the generator is Philox, the numbers are normal and uniform, and nothing but the key matters."""

import pytest
import torch
from scipy import stats
from torch import tensor

from diffalign.denoising import normal, uniform
from diffalign.denoising.draws import philox4x32
from diffalign.errors import ConfigError

IDS = tensor([7, 0, 2**32 + 7, 2**62 + 11])  # two of them agree in their lower 32 bits


# Known answers of the Random123 library, `tests/kat_vectors`, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox4x32(tuple(tensor(word) for word in counter), key)
    assert tuple(word.item() for word in words) == answer


def test_a_draw_depends_on_its_key_alone():
    together = normal(3, 11, IDS, (4, 5, 3))
    assert together.shape == (4, 4, 5, 3)
    assert together.dtype == torch.float32
    order = tensor([2, 0, 3, 1])
    assert torch.equal(normal(3, 11, IDS[order], (4, 5, 3)), together[order])
    for row, example_id in enumerate(IDS):
        assert torch.equal(normal(3, 11, example_id[None], (4, 5, 3))[0], together[row])
    fractions = uniform(3, 11, IDS, "timesteps")
    assert fractions.dtype == torch.float64
    assert torch.equal(uniform(3, 11, IDS[order], "timesteps"), fractions[order])


def test_every_part_of_the_key_matters():
    seen = [
        normal(seed, step, IDS, (6,), stream)
        for seed in (0, 1, 2**32 - 1)
        for step in (0, 1, 2**20)
        for stream in ("noise", "noise_l")
    ]
    rows = torch.cat(seen)
    assert len(rows) == 3 * 3 * 2 * len(IDS)
    # Not one number recurs, in whatever place.
    assert len(rows.unique()) == rows.numel()


def test_the_global_generator_is_neither_read_nor_advanced():
    torch.manual_seed(0)
    first, state = normal(0, 0, IDS, (8,)), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(normal(0, 0, IDS, (8,)), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_shapes_that_are_no_multiple_of_a_block(count):
    assert torch.equal(normal(0, 0, IDS, (count,)), normal(0, 0, IDS, (5,))[:, :count])
    assert normal(0, 0, IDS[:0], (count,)).shape == (0, count)


def test_normal_numbers_are_normal_and_independent():
    sample = normal(5, 100, torch.arange(64), (4, 16, 16)).double()
    assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(normal(5, 100, torch.arange(20000), (1,)).flatten().numpy(), "norm").pvalue > 0.01
    flat = sample.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(64)
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5  # neighbouring ids
    lagged = [(sample.flatten()[:-lag] * sample.flatten()[lag:]).mean().abs() for lag in (1, 2, 3, 4, 1024)]
    assert max(lagged) < 5 / sample.numel() ** 0.5  # neighbouring elements: Box-Muller pairs, blocks
    squares = sample.flatten().square() - 1
    assert (squares[:-1] * squares[1:]).mean().abs() < 5 * 2 / sample.numel() ** 0.5  # a pair shares its radius


def test_uniform_numbers_are_uniform():
    sample = uniform(5, 100, torch.arange(20000), "timesteps")
    assert sample.min() >= 0
    assert sample.max() < 1
    assert stats.kstest(sample.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_do_not_fit_are_refused(seed):
    with pytest.raises(ConfigError, match=f'"seed" must be an integer from 0 to 4294967295, got {seed}'):
        normal(seed, 0, IDS, (4,))


@pytest.mark.parametrize("example_ids", [IDS.double(), IDS[None], IDS.int()])
def test_ids_that_are_none_are_refused(example_ids):
    with pytest.raises(AssertionError, match="example ids must be"):
        uniform(0, 0, example_ids, "timesteps")
