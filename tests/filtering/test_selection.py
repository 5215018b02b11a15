"""Top-K: ties, caps, what can never be chosen, and how --keep is read."""

import numpy as np
import pytest

from diffalign.errors import ConfigError
from diffalign.filtering import parse_keep, select
from diffalign.filtering.selection import count_of


def test_equal_values_are_taken_in_order():
    assert select(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 4).tolist() == [1, 2, 4, 0]


def test_missing_values_are_never_taken():
    assert select(np.array([np.nan, 1.0, -np.inf, 3.0]), 4).tolist() == [3, 1]


def test_a_cap_lets_the_next_prompt_in():
    values = np.array([9.0, 8.0, 7.0, 6.0, 5.0])
    prompts = ["a", "a", "a", "b", "b"]
    assert select(values, 3, prompts, cap=1).tolist() == [0, 3]
    assert select(values, 3, prompts, cap=2).tolist() == [0, 1, 3]
    assert select(values, 3, prompts).tolist() == [0, 1, 2]


def test_capped_selection_equals_the_greedy_loop():
    generator = np.random.default_rng(1)
    values, prompts = generator.integers(0, 50, 500).astype(float), generator.integers(0, 60, 500)
    taken, used = [], dict.fromkeys(range(60), 0)
    for index in sorted(range(500), key=lambda i: (-values[i], i)):
        if len(taken) < 80 and used[prompts[index]] < 2:
            taken.append(index)
            used[prompts[index]] += 1
    assert select(values, 80, prompts, cap=2).tolist() == taken


@pytest.mark.parametrize(("text", "keep"), [("0.1", 0.1), ("5000", 5000), ("1.0", 1.0), ("1", 1), ("5e3", 5000)])
def test_keep_is_a_share_or_a_number(text, keep):
    assert parse_keep(text) == keep
    assert type(parse_keep(text)) is type(keep)


@pytest.mark.parametrize("text", ["0", "-0.1", "1.5", "half", "nan", "inf"])
def test_other_keeps_are_refused(text):
    with pytest.raises(ConfigError, match="--keep must be"):
        parse_keep(text)


def test_counts():
    assert [count_of(0.1, 295), count_of(0.001, 10), count_of(7, 5), count_of(1.0, 5)] == [30, 1, 5, 5]
