"""Frozen passes: no gradient, no side effect, and the same bits as the policy with the same weights."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig

from diffalign.denoising import FrozenDenoiser
from tests.denoising.conftest import Prompts, predict


@contextmanager
def adapters_off(unet):
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def add_lora(unet, std):
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def modes(module):
    return [part.training for part in module.modules()]


def test_adapters_off_equals_a_copy_made_before_them(unet, batch, cond):
    copy = FrozenDenoiser.copy_of(unet, predict)
    add_lora(unet, std=0.5)
    reference = FrozenDenoiser(unet, predict, frozen_weights=adapters_off)
    with torch.no_grad():
        adapted = predict(unet, batch.xt, batch.timesteps, cond)
    got = reference(batch.xt, batch.timesteps, cond)
    assert torch.equal(got, copy(batch.xt, batch.timesteps, cond))
    assert (got - adapted).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(predict(unet, batch.xt, batch.timesteps, cond), adapted)


def test_copy_does_not_follow_the_policy(unet, batch, cond):
    copy = FrozenDenoiser.copy_of(unet, predict)
    before = copy(batch.xt, batch.timesteps, cond)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1)
    assert torch.equal(copy(batch.xt, batch.timesteps, cond), before)
    assert not any(parameter.requires_grad for parameter in copy.denoiser.parameters())
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_pass_is_without_gradient_in_evaluation_mode_and_restores_every_mode(unet, batch, cond):
    unet.mid_block.eval()
    before = modes(unet)
    assert {True, False} == set(before)
    seen = []

    def spy(denoiser, *arguments):
        seen.append((any(modes(denoiser)), torch.is_grad_enabled()))
        return predict(denoiser, *arguments)

    pred = FrozenDenoiser(unet, spy)(batch.xt, batch.timesteps, cond)
    assert seen == [(False, False)]
    assert not pred.requires_grad
    assert modes(unet) == before


def test_modes_and_adapters_are_restored_when_the_pass_fails(unet, batch, cond):
    add_lora(unet, std=0.5)
    before = modes(unet)

    def fail(*_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        FrozenDenoiser(unet, fail, frozen_weights=adapters_off)(batch.xt, batch.timesteps, cond)
    assert modes(unet) == before
    assert not unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.disable_adapters


@pytest.mark.parametrize("micro_batch_size", [1, 4, 6, 100])
def test_micro_batches_leave_the_prediction_unchanged(unet, batch, cond, micro_batch_size):
    whole = FrozenDenoiser(unet, predict)(batch.xt, batch.timesteps, cond)
    sizes = []

    def spy(denoiser, xt, timesteps, part):
        assert len(xt) == len(timesteps) == len(part.prompt_embeds)
        sizes.append(len(xt))
        return predict(denoiser, xt, timesteps, part)

    parts = FrozenDenoiser(unet, spy, micro_batch_size=micro_batch_size)(batch.xt, batch.timesteps, cond)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert whole.std() > 0.01
    assert sizes == {1: [1] * 6, 4: [4, 2], 6: [6], 100: [6]}[micro_batch_size]


def test_prediction_is_float32_whatever_the_network_is(unet, batch, cond):
    def predict_half(denoiser, xt, timesteps, part):
        return predict(denoiser, xt.bfloat16(), timesteps, Prompts(part.prompt_embeds.bfloat16()))

    assert FrozenDenoiser(unet.bfloat16(), predict_half)(batch.xt, batch.timesteps, cond).dtype == torch.float32


# Before pytorch/pytorch#165068 autocast kept the weights it had cast without gradient and used them in the next pass.
def test_frozen_pass_of_trained_weights_under_autocast_does_not_cost_them_their_gradient(unet, batch, cond):
    with torch.autocast("cpu", torch.bfloat16):
        FrozenDenoiser(unet, predict)(batch.xt, batch.timesteps, cond)
        predict(unet, batch.xt, batch.timesteps, cond).float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.conv_in.parameters())
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_v.weight.grad is not None
