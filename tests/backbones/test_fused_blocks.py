"""Fused activations in a UNet: where they are put, that nothing else changes, and what is no longer kept."""

import copy
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from benchmarks.activations import saved_bytes
from diffalign.backbones import adapters
from diffalign.backbones.fused_blocks import FusedGEGLU, GroupNormSiLU, fuse_activations
from diffalign.backbones.fused_lora import fuse_lora
from diffalign.jobs.training import networks
from tests.backbones.drawing import perturb
from tests.backbones.test_fused_lora import _step, _worst
from tests.tiny import tiny_unet_sd15, tiny_unet_sdxl

GEGLUS, NORMS = 17, 35  # transformer blocks; two a resnet and the last one


def _pair(make=tiny_unet_sdxl, lora=True):
    """Return a UNet with diffusers' activations and a copy with fused ones."""
    torch.manual_seed(0)
    unet = make()
    if lora:
        perturb(adapters.add_lora(unet, 4, alpha=8))
        fuse_lora(unet)
    fused = copy.deepcopy(unet)
    assert fuse_activations(fused, wanted=True) > 0
    return unet, fused


def _assert_same_bits(step, expected):
    assert torch.equal(step[0], expected[0])
    assert torch.equal(step[1], expected[1])
    assert step[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert torch.equal(step[2][name], gradient), name


@pytest.mark.parametrize("autocast", [False, True])
def test_predictions_and_all_gradients_have_diffusers_bits(autocast):
    unet, fused = _pair()
    expected = _step(unet, autocast)
    assert all(gradient.count_nonzero() for gradient in expected[2].values())
    _assert_same_bits(_step(fused, autocast), expected)


def test_in_channels_last_gradients_agree_up_to_rounding():
    """Torch's own way mixes layouts in the backward pass and adds up in another order."""
    unet, fused = (network.to(memory_format=torch.channels_last) for network in _pair())
    expected, step = _step(unet), _step(fused)
    assert torch.equal(step[0], expected[0])
    assert _worst(step, expected) < 1e-5


def test_full_training_trains_the_norms():
    unet, fused = _pair(lora=False)
    expected = _step(unet)
    assert expected[2]["down_blocks.0.resnets.0.norm1.weight"].count_nonzero() == 16
    _assert_same_bits(_step(fused), expected)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointing_changes_no_gradient(kind):
    unet, fused = _pair()
    networks.checkpoint_activations(fused, kind)
    _assert_same_bits(_step(fused.train()), _step(unet))


def test_names_and_modules_stay():
    unet, fused = _pair()
    assert fused.state_dict().keys() == unet.state_dict().keys()
    kinds = [type(module) for module in fused.modules()]
    assert (kinds.count(FusedGEGLU), kinds.count(GEGLU), kinds.count(GroupNormSiLU)) == (GEGLUS, 0, NORMS)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in unet.named_modules()]
    assert fuse_activations(fused, wanted=True) == 0  # once is enough
    again = copy.deepcopy(fused)
    assert [type(module) for module in again.modules()] == kinds
    assert isinstance(fused, UNet2DConditionModel)


def test_the_embedding_of_the_timestep_is_still_activated():
    resnet = _pair()[1].down_blocks[0].resnets[0]
    vectors = torch.tensor([[-1.0, 2.0]])
    torch.testing.assert_close(resnet.nonlinearity(vectors), vectors * vectors.sigmoid())


def test_what_is_compiled_is_left_to_the_compiler():
    unet = tiny_unet_sdxl()
    assert fuse_activations(unet, wanted=True, compiled="full") == 0
    assert fuse_activations(unet, wanted=True, compiled="regional") == NORMS  # resnets are not among the regions
    assert not any(isinstance(module, FusedGEGLU) for module in unet.modules())


def test_a_cpu_has_them_only_if_asked():
    assert fuse_activations(tiny_unet_sd15()) == 0
    assert fuse_activations(tiny_unet_sd15(), wanted=False) == 0


def test_other_activations_and_embeddings_that_scale_are_left_alone():
    unet = tiny_unet_sd15()
    unet.down_blocks[0].resnets[0].time_embedding_norm = "scale_shift"
    unet.down_blocks[0].resnets[1].nonlinearity = torch.nn.Mish()
    fuse_activations(unet, wanted=True)
    assert [type(resnet.norm1) for resnet in unet.down_blocks[0].resnets] == [torch.nn.GroupNorm] * 2
    assert type(unet.down_blocks[1].resnets[0].norm2) is GroupNormSiLU


def test_a_unet_keeps_less():
    kept = []
    for unet in _pair():
        xt = torch.randn(2, 4, 8, 8)
        added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
        run = partial(unet, xt, 7, torch.ones(2, 77, 48), added_cond_kwargs=added, return_dict=False)
        kept.append(saved_bytes(lambda run=run: run()[0], tuple(unet.parameters())))
    assert kept[1] < 0.9 * kept[0]


def test_a_resnet_recomputed_selectively_keeps_nothing_of_its_activations():
    _, fused = _pair()
    contexts = partial(create_selective_checkpoint_contexts, list(networks._kept_operators()))
    resnet, x, temb = fused.mid_block.resnets[0], torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 64)
    run = partial(torch.utils.checkpoint.checkpoint, resnet, x, temb, use_reentrant=False, context_fn=contexts)
    (expected,) = torch.autograd.grad(resnet(x, temb).square().sum(), x)
    (gradient,) = torch.autograd.grad(run().square().sum(), x)
    assert torch.equal(gradient, expected)
    assert saved_bytes(run, (x, temb)) < saved_bytes(lambda: resnet(x, temb), (x, temb))
