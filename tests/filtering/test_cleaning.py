"""Same prompts, repeated pairs, and the split by prompt."""

import pandas as pd
import pytest

from diffalign.errors import DataError
from diffalign.filtering.cleaning import dedupe, held_out, prompt_key


def table(*rows):
    return pd.DataFrame(rows, columns=["images_id", "example_id"])


def test_case_and_spaces_make_no_other_prompt():
    assert prompt_key("  A Red\n circle ") == prompt_key("a red circle") != prompt_key("a red circles")


def test_the_first_of_repeated_pairs_stays():
    found = dedupe(table((1, 10), (2, 20), (1, 10)))
    assert found.keep.tolist() == [True, True, False]
    assert (found.repeated, found.contradicted) == (1, 0)


def test_the_majority_decides_and_a_draw_decides_nothing():
    found = dedupe(table((1, 11), (1, 10), (1, 10), (2, 20), (2, 21), (3, 30)))
    assert found.keep.tolist() == [False, True, False, False, False, True]
    assert (found.repeated, found.contradicted) == (2, 2)


def test_a_prompt_is_on_one_side_only_and_stays_there():
    prompts = pd.Series([f"prompt {i % 200}" for i in range(600)])
    mask = held_out(prompts, 0.25, seed=1)
    assert set(prompts[mask]).isdisjoint(prompts[~mask])
    assert 30 < prompts[mask].nunique() < 70
    assert held_out(prompts[:50], 0.25, seed=1).tolist() == mask[:50].tolist()
    assert held_out(prompts, 0.25, seed=2).tolist() != mask.tolist()
    assert not held_out(prompts, 0.0).any()


def test_a_larger_share_holds_out_all_of_a_smaller_one():
    prompts = pd.Series([f"prompt {i}" for i in range(300)])
    assert not (held_out(prompts, 0.1) & ~held_out(prompts, 0.3)).any()


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_shares_outside_are_refused(share):
    with pytest.raises(DataError, match="share of the prompts"):
        held_out(pd.Series(["a"]), share)


def test_an_empty_side_is_an_error():
    with pytest.raises(DataError, match="holds out 0 of 1 prompts"):
        held_out(pd.Series(["a"]), 1e-9)
