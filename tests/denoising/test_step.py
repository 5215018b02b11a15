"""The denoising step: errors against golden records, and a DPO logit of exactly zero before the first update."""

import math
from dataclasses import replace

import pytest
import torch
from torch import tensor

from diffalign import objectives
from diffalign.denoising import (
    DDPMPath,
    DenoisingBatch,
    DenoisingOutputs,
    FrozenDenoiser,
    add_noise,
    denoising_step,
    errors,
    pair_errors,
    single_errors,
    target,
    to_x0,
)
from tests import golden
from tests.denoising.conftest import predict
from tests.denoising.test_frozen import adapters_off, add_lora

RECORDS = golden.load("denoising")


def reference_of(kind, unet):
    if kind == "copy":
        return FrozenDenoiser.copy_of(unet, predict)
    add_lora(unet, std=0.0)
    return FrozenDenoiser(unet, predict, frozen_weights=adapters_off)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["copy", "adapters off"])
def test_dpo_starts_at_a_logit_of_exactly_zero(unet, batch, cond, kind, autocast):
    reference = reference_of(kind, unet)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = denoising_step(predict, unet, batch, cond, reference)
    measured = pair_errors(outputs, batch)
    dpo = objectives.load("dpo")
    loss = dpo.loss(measured)
    assert torch.equal(dpo.logit(measured), torch.zeros(3))
    assert torch.equal(loss, torch.full((3,), math.log(2)))
    assert measured.policy_w.dtype == torch.float32
    # Not because nothing was computed: the errors differ and the gradient points somewhere.
    assert len(torch.cat([measured.policy_w, measured.policy_l]).unique()) == 6
    loss.mean().backward()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.grad.abs().sum() for parameter in trained if parameter.grad is not None) > 1.0


def test_an_update_moves_the_policy_away_from_the_reference(unet, batch, cond):
    reference = reference_of("adapters off", unet)
    dpo = objectives.load("dpo", beta=1000.0)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    dpo.loss(pair_errors(denoising_step(predict, unet, batch, cond, reference), batch)).mean().backward()
    optimizer.step()
    after = pair_errors(denoising_step(predict, unet, batch, cond, reference), batch)
    assert dpo.loss(after).mean() < math.log(2)
    assert after.margin.mean() > 0


def test_reference_comes_first_and_only_on_demand(unet, batch, cond):
    order = []

    def spy(name):
        def run(*arguments):
            order.append(name)
            return predict(*arguments)

        return run

    outputs = denoising_step(spy("policy"), unet, batch, cond, FrozenDenoiser.copy_of(unet, spy("reference")))
    assert order == ["reference", "policy"]
    assert outputs.policy.requires_grad
    assert not outputs.reference.requires_grad
    assert denoising_step(predict, unet, batch, cond).reference is None


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("x0_conversion_")])
def test_errors_in_epsilon_and_v_space(name):
    record, noised = RECORDS[name], RECORDS[name.replace("x0_conversion", "q_sample")]
    x0, noise = tensor(noised["inputs"]["x0"]), tensor(noised["inputs"]["eps"])
    pred, timesteps = tensor(record["inputs"]["model_output"]), tensor([record["inputs"]["t"]] * 2)
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    epsilon = DDPMPath.from_config(config)
    v = DDPMPath(epsilon.alphas_cumprod, "v_prediction")
    x0_pred = to_x0(epsilon, add_noise(epsilon, x0, noise, timesteps), pred, timesteps)
    # One denoiser in two parametrisations: its v is that of the noise and the x0 it stands for.
    for path, output, key in [
        (epsilon, pred, "mean_sq_err_eps"),
        (v, target(v, x0_pred, pred, timesteps), "mean_sq_err_v"),
    ]:
        policy, reference = errors(DenoisingOutputs(policy=output), noised_batch(path, x0, noise, timesteps))
        golden.assert_close(record, key, policy)
        assert reference is None


def noised_batch(path, x0, noise, timesteps):
    alpha, sigma = path.alpha_sigma(timesteps)
    return DenoisingBatch(
        x0=x0,
        noise=noise,
        xt=add_noise(path, x0, noise, timesteps),
        target=target(path, x0, noise, timesteps),
        timesteps=timesteps,
        alpha=alpha,
        sigma=sigma,
    )


def test_pairs_are_winners_then_losers(batch):
    offsets = torch.arange(6.0).view(6, 1, 1, 1)
    outputs = DenoisingOutputs(policy=batch.target + offsets, reference=batch.target - offsets / 2)
    labels = tensor([0.5, 0.7, 0.9])
    pairs = pair_errors(outputs, batch, preference=labels)
    torch.testing.assert_close(pairs.policy_w, tensor([0.0, 1.0, 4.0]))
    torch.testing.assert_close(pairs.policy_l, tensor([9.0, 16.0, 25.0]))
    torch.testing.assert_close(pairs.reference_w, tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(pairs.reference_l, tensor([2.25, 4.0, 6.25]))
    assert torch.equal(pairs.preference, labels)

    desirable = tensor([True, False] * 3)
    images = single_errors(outputs, batch, desirable=desirable)
    assert torch.equal(images.policy, torch.cat([pairs.policy_w, pairs.policy_l]))
    assert torch.equal(images.reference, torch.cat([pairs.reference_w, pairs.reference_l]))
    assert torch.equal(images.desirable, desirable)


def test_half_precision_predictions_are_squared_in_float32(batch):
    pred = batch.target.bfloat16() * 1.01
    policy, reference = errors(DenoisingOutputs(policy=pred, reference=pred), batch)
    exact = (pred.double() - batch.target.double()).square().mean((1, 2, 3))
    assert policy.dtype == torch.float32
    torch.testing.assert_close(policy.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(policy, reference)


def test_pair_errors_do_not_depend_on_the_rest_of_the_batch(unet, batch, cond):
    whole = pair_errors(denoising_step(predict, unet, batch, cond), batch)
    members = tensor([1, 4])
    part = replace(batch, **{name: getattr(batch, name)[members] for name in vars(batch)})
    alone = pair_errors(denoising_step(predict, unet, part, cond.select(members)), part)
    torch.testing.assert_close(alone.policy_w, whole.policy_w[1:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(alone.policy_l, whole.policy_l[1:2], rtol=1e-5, atol=0)
