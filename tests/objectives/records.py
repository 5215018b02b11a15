"""The goldens of pair objectives, and how one is compared with them."""

from torch import tensor

from diffalign.objectives import PairErrors
from tests import golden

RECORDS = golden.load("objectives")


def golden_errors(record, **more):
    leaves = {key: tensor(value, requires_grad=key.startswith("m")) for key, value in record["inputs"].items()}
    errors = PairErrors(
        policy_w=leaves["m_w"], policy_l=leaves["m_l"], reference_w=leaves["r_w"], reference_l=leaves["r_l"], **more
    )
    return errors, leaves


def assert_loss_and_gradients(record, objective, **more):
    """Compare with a golden; `more` are further fields of the errors."""
    errors, leaves = golden_errors(record, **more)
    loss = objective.loss(errors)
    loss.mean().backward()
    golden.assert_close(record, "per_example_loss", loss)
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_m_w", leaves["m_w"].grad)
    golden.assert_close(record, "grad_m_l", leaves["m_l"].grad)
