"""SDPO and DSPO: objectives that need more of the predictions than their errors."""

import pytest
import torch
from torch import tensor

from diffalign.denoising import DenoisingBatch, DenoisingOutputs, pair_errors
from diffalign.objectives import load
from tests import golden
from tests.objectives.records import RECORDS, golden_errors


def errors_of(record, needs):
    """Measure the errors of a record's predictions; the denoising problem is only its target."""
    pred = tensor(record["inputs"]["pred"], dtype=torch.float64).float().requires_grad_()
    target = tensor(record["inputs"]["target"])
    reference = tensor(record["inputs"]["ref"]) if "ref" in record["inputs"] else torch.zeros_like(target)
    if len(target) < len(pred):
        target = torch.cat([target, target])
    scalar = torch.zeros(len(pred))
    problem = DenoisingBatch(
        x0=target, noise=target, xt=target, target=target, timesteps=scalar.long(), alpha=scalar, sigma=scalar
    )
    outputs = DenoisingOutputs(policy=pred, reference=reference)
    return pair_errors(outputs, problem, needs=needs), pred


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("sdpo_lambda_")])
def test_authors_scale_of_the_loser(name):
    record = RECORDS[name]
    errors, _ = errors_of(record, {"reference", "residual_product"})
    for mu, expected in record["expected"]["lambda_by_mu"].items():
        scale = load("sdpo", mu=float(mu), scope="batch").loser_scale(errors)
        assert scale.tolist() == pytest.approx([expected] * len(scale), rel=1e-5, abs=1e-6)


def test_a_loser_that_does_no_harm_keeps_its_gradient():
    errors, _ = golden_errors(RECORDS["dpo_c1_b2000"], residual_product=tensor([-0.01, 0.0, 1e-6]))
    assert load("sdpo", mu=0.6).loser_scale(errors).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("case", ["c1", "c2"])
@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_authors_loss_with_a_given_scale(case, scale):
    record = RECORDS[f"sdpo_dpo_{case}_lam{scale:g}"]
    sdpo = load("sdpo", beta=2000.0, mu=0.5)
    # lambda = (1 - mu) * policy_w / product
    product = (
        (0.5 * tensor(record["inputs"]["m_w"]) / scale) if scale else torch.full((len(record["inputs"]["m_w"]),), 1e30)
    )
    errors, leaves = golden_errors(record, residual_product=product)
    loss = sdpo.loss(errors)
    loss.mean().backward()
    golden.assert_close(record, "per_example_loss", loss)
    golden.assert_close(record, "grad_m_w", leaves["m_w"].grad)
    golden.assert_close(record, "grad_m_l", leaves["m_l"].grad)


def test_a_step_along_the_scaled_gradient_does_not_raise_the_winners_error():
    """The guarantee of the paper, in the space of predictions: to first order, -grad . grad(policy_w) <= 0."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 4, 4, 4, generator=generator)
    residual = torch.randn(1, 4, 4, 4, generator=generator).expand(2, -1, -1, -1)
    # One network: a change of the loser's residual moves the winner's along with it.
    for amplitude, rises in ((2.0, True), (0.2, False)):
        rise = {}
        for name in ("dpo", "sdpo"):
            shared = torch.zeros(1, 4, 4, 4, requires_grad=True)
            pred = target + torch.cat([residual[:1], amplitude * residual[1:]]) + shared
            problem = DenoisingBatch(
                x0=target, noise=target, xt=target, target=target,
                timesteps=torch.zeros(2).long(), alpha=torch.ones(2), sigma=torch.ones(2),
            )  # fmt: skip
            outputs = DenoisingOutputs(policy=pred, reference=target)
            errors = pair_errors(outputs, problem, needs={"residual_product"})
            (winner,) = torch.autograd.grad(errors.policy_w.sum(), shared, retain_graph=True)
            (step,) = torch.autograd.grad(load(name, beta=1.0).loss(errors).sum(), shared)
            rise[name] = -(step * winner).sum().item()
        assert (rise["dpo"] > 0) == rises
        assert rise["sdpo"] <= 0


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("dspo_")])
def test_authors_dspo(name):
    record = RECORDS[name]
    variant = "sdxl" if name == "dspo_sdxl" else "sd15"
    objective = load("dspo", beta=record["hyperparameters"]["beta"], variant=variant)
    errors, pred = errors_of(record, objective.needs)
    golden.assert_close(record, "logit", objective.logit(errors))
    loss = objective.loss(errors)
    loss.mean().backward()
    golden.assert_close(record, "mean_loss", loss.mean())
    golden.assert_close(record, "grad_pred", pred.grad)


def test_dspo_sdxl_switches_to_the_drift():
    record = RECORDS["dspo_sdxl"]
    objective = load("dspo", beta=1.0, variant="sdxl")
    errors, _ = errors_of(record, objective.needs)
    weight = (-objective.logit(errors)).sigmoid()
    assert errors.drift_w.max() < 0.1
    torch.testing.assert_close(objective.loss(errors), weight**2)
    far = {"reference": 10 * tensor(record["inputs"]["ref"])}
    outputs = record | {"inputs": record["inputs"] | {"ref": far["reference"].tolist()}}
    errors, _ = errors_of(outputs, objective.needs)
    assert errors.drift_w.min() > 0.1
    weight = (-objective.logit(errors)).sigmoid()
    torch.testing.assert_close(objective.loss(errors), weight**2 * errors.drift_w)
