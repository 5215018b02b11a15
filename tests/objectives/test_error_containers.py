"""The containers of errors: margins, and what they refuse to hold."""

import pytest
import torch
from torch import tensor

from diffalign.objectives import ListErrors, PairErrors, SingleErrors, Transitions


def test_margin_and_implicit_accuracy():
    errors = PairErrors(
        policy_w=tensor([0.25, 0.50, 0.25], requires_grad=True),
        policy_l=tensor([0.75, 0.50, 0.25]),
        reference_w=tensor([0.50, 0.25, 0.50]),
        reference_l=tensor([0.50, 0.75, 0.50]),
    )
    assert errors.margin.tolist() == [0.5, -0.5, 0.0]
    assert errors.implicit_accuracy.tolist() == [1.0, 0.0, 0.5]
    assert not errors.implicit_accuracy.requires_grad


def test_margin_without_reference_is_refused():
    with pytest.raises(AssertionError, match=r"Objective\.needs"):
        _ = PairErrors(policy_w=torch.ones(2), policy_l=torch.ones(2)).margin


@pytest.mark.parametrize(
    ("container", "tensors", "message"),
    [
        (PairErrors, {"policy_w": torch.ones(2), "policy_l": torch.ones(3)}, "policy_l has shape"),
        (PairErrors, {"policy_w": torch.ones(2, 1), "policy_l": torch.ones(2, 1)}, "expected 1 dimension"),
        (SingleErrors, {"policy": torch.ones(2, dtype=torch.bfloat16)}, "float32"),
        (ListErrors, {"policy": torch.ones(2, 3), "scores": torch.ones(2, 3, dtype=torch.float16)}, "float32"),
        (ListErrors, {"policy": torch.ones(6), "scores": torch.ones(6)}, "expected 2 dimension"),
        (Transitions, {"log_prob_w": torch.ones(2), "log_prob_l": torch.ones(1)}, "log_prob_l has shape"),
    ],
)
def test_inconsistent_tensors_are_refused(container, tensors, message):
    with pytest.raises(AssertionError, match=message):
        container(**tensors)
