"""MaPO against the exact values of the authors' formula, and where their float32 form loses its digits."""

import pytest
import torch
from torch import tensor

from diffalign.objectives import PairErrors, load
from tests import golden
from tests.objectives.records import RECORDS


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("mapo_expm1_")])
def test_authors_formula(name):
    record = RECORDS[name]
    given = record["hyperparameters"]
    objective = load("mapo", beta=given["beta_mapo"], snr_value=given["snr_value_k"], num_train_timesteps=given["T"])
    policy_w, policy_l = (tensor(record["inputs"][key], requires_grad=True) for key in ("m_w", "m_l"))
    loss = objective.loss(PairErrors(policy_w=policy_w, policy_l=policy_l))
    loss.mean().backward()
    golden.assert_close(record, "per_example_loss", loss)
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_m_w", policy_w.grad)
    golden.assert_close(record, "grad_m_l", policy_l.grad)


def test_equal_errors_leave_the_denoising_loss_and_log_2():
    errors = PairErrors(policy_w=tensor([0.2, 0.0]), policy_l=tensor([0.2, 0.0]))
    torch.testing.assert_close(load("mapo").loss(errors), tensor([0.2693147, 0.0693147]))


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.29, 0.31, 0.59, 0.61, 2.0])
def test_the_logit_keeps_its_digits(size):
    exact = PairErrors(policy_w=tensor([size], dtype=torch.float64), policy_l=tensor([1.1 * size], dtype=torch.float64))
    single = PairErrors(policy_w=exact.policy_w.float(), policy_l=exact.policy_l.float())
    z_w, z_l = 0.5 * exact.policy_w, 0.5 * exact.policy_l
    truth = 1000 * (z_w / torch.expm1(z_w) - z_l / torch.expm1(z_l))
    torch.testing.assert_close(load("mapo").logit(exact), truth, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(load("mapo").logit(single).double(), truth, rtol=3e-4, atol=2e-4)
