"""With adapters behind the encoder only, the encoder runs once for policy and reference, and nothing changes."""

import pytest
import torch

from diffalign.backbones import adapters
from diffalign.backbones.prefix import SharedPrefix
from diffalign.denoising import FrozenDenoiser, denoising_step
from diffalign.errors import ModelError
from tests.denoising.conftest import batch, cond, predict, unet  # noqa: F401


@pytest.fixture
def adapted(unet):  # noqa: F811
    adapters.add_lora(unet, 2, target_modules=["to_q", "to_v", "conv1"], blocks=["mid", "up"])
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return unet


def outputs(unet, problem, cond, prefix):  # noqa: F811
    switch = adapters.adapter_switch(unet)
    reference = FrozenDenoiser(unet, predict, frozen_weights=lambda _: switch(), prefix=prefix)
    found = denoising_step(predict, unet, problem, cond, reference)
    trained = adapters.trainable_parameters(unet)
    return found, torch.autograd.grad(found.policy.square().sum(), trained)


def test_results_and_gradients_are_the_same_bits_and_the_encoder_runs_once(adapted, batch, cond):  # noqa: F811
    calls = []
    adapted.down_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.append(1))
    plain, gradients = outputs(adapted, batch, cond, None)
    assert len(calls) == 2
    shared, again = outputs(adapted, batch, cond, SharedPrefix(adapted))
    assert len(calls) == 3
    assert torch.equal(shared.policy, plain.policy)
    assert torch.equal(shared.reference, plain.reference)
    assert not torch.equal(plain.policy, plain.reference)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_other_passes_compute_the_encoder(adapted, batch, cond):  # noqa: F811
    expected = predict(adapted, batch.xt, batch.timesteps, cond)
    outputs(adapted, batch, cond, SharedPrefix(adapted))
    moved = predict(adapted, batch.xt + 1, batch.timesteps, cond)
    assert not torch.equal(moved, expected)
    assert torch.equal(predict(adapted, batch.xt, batch.timesteps, cond), expected)


def test_a_pass_that_no_policy_follows_keeps_nothing(adapted, batch, cond):  # noqa: F811
    """Inversions run a whole window of images through the reference: kept, their features would fill the memory."""
    prefix, switch = SharedPrefix(adapted), adapters.adapter_switch(adapted)
    reference = FrozenDenoiser(adapted, predict, lambda _: switch(), micro_batch_size=2, prefix=prefix)
    reference(batch.xt, batch.timesteps, cond)
    assert not prefix._results


def test_only_the_wanted_blocks_are_adapted(adapted):
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names
    assert all(name.startswith(("mid_block.", "up_blocks.")) for name in names)


def test_a_target_outside_the_blocks_is_refused(unet):  # noqa: F811
    with pytest.raises(ModelError, match='"conv_in" matches no'):
        adapters.add_lora(unet, 2, target_modules=["conv_in"], blocks=["up"])
    with pytest.raises(ModelError, match='Unknown LoRA block "middle"'):
        adapters.add_lora(unet, 2, blocks=["middle"])
