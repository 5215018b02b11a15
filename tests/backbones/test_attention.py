"""Attention: text shared by the images of an example, a choice of kernel that takes effect, and the probe for it."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffalign.backbones import Conditioning, adapters, attention, attention_probe
from diffalign.backbones.attention_probe import AttentionShape
from diffalign.backbones.fused_lora import fuse_lora
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.errors import ModelError
from tests.backbones.drawing import perturb
from tests.tiny import tiny_unet_sd15, tiny_unet_sdxl

CPU = torch.device("cpu")
FAMILIES = {"sdxl": (SDXL, tiny_unet_sdxl, 48), "sd15": (SD15, tiny_unet_sd15, 32)}


def _problem(family, images=3):
    """Return the predict function, a UNet with acting adapters and the conditioning of 2 prompts for `images` each."""
    backbone, make, width = FAMILIES[family]
    torch.manual_seed(0)
    unet = make()
    perturb(adapters.add_lora(unet, 2))
    told = {"prompt_embeds": torch.randn(2, 77, width).repeat(images, 1, 1)}
    if family == "sdxl":
        told |= {"pooled_prompt_embeds": torch.randn(2 * images, 32), "add_time_ids": torch.ones(2 * images, 6)}
    host = backbone.__new__(backbone)  # without the parts that `predict` does not read
    xt, timesteps = torch.randn(2 * images, 4, 8, 8), torch.tensor([3, 900] * images)
    return lambda unet, cond: host.predict(unet, xt, timesteps, cond), unet, Conditioning(told)


def _gradients(predict, unet, cond):
    unet.zero_grad()
    pred = predict(unet, cond)
    pred.square().mean().backward()
    return [pred.detach(), *(p.grad for p in unet.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_text_predicts_what_repeated_text_does(family):
    predict, unet, repeated = _problem(family)
    expected = _gradients(predict, unet, repeated)
    sharing = copy.deepcopy(unet)
    fuse_lora(sharing)
    assert attention.share_text(sharing) == len(list(_projections(sharing, "attn2.to_k")))
    for value, right in zip(_gradients(predict, sharing, repeated.shared(3)), expected, strict=True):
        assert (value - right).norm() < 1e-4 * right.norm() + 1e-9  # one token attends to itself: gradients of 0


def test_keys_and_values_are_projected_once_a_prompt():
    predict, unet, repeated = _problem("sdxl")
    attention.share_text(unet)
    rows = {"attn2.to_q": set(), "attn2.to_k": set(), "attn2.to_v": set()}
    for name, seen in rows.items():
        for layer in _projections(unet, name):
            layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.add(len(inputs[0])))
    predict(unet, repeated.shared(3))
    assert rows == {"attn2.to_q": {6}, "attn2.to_k": {2}, "attn2.to_v": {2}}


def _projections(unet, ending):
    return (module for name, module in unet.named_modules() if name.endswith(ending))


def test_a_network_that_does_not_share_gets_repeated_text():
    predict, unet, repeated = _problem("sdxl")
    with torch.no_grad():
        assert torch.equal(predict(unet, repeated.shared(3)), predict(unet, repeated))
    attention.share_text(unet)
    assert attention.shares_text(nn.DataParallel(unet))  # wrapped


def _operators(unet):
    attn = next(module for name, module in unet.named_modules() if name.endswith("attn1"))
    with torch.profiler.profile() as profile:
        attn(torch.randn(1, 4, 16))
    return {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}


def test_the_chosen_kernel_is_the_one_that_runs():
    unet = tiny_unet_sd15()
    flash, math = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
    for name, expected, other in (("default", flash, math), ("math", math, flash), ("flash", flash, math)):
        assert attention.use_backend(unet, name) == 32
        assert expected in (operators := _operators(unet))
        assert other not in operators
    attention.use_backend(unet, "math")
    attention.share_text(unet)  # keeps the kernel
    assert math in _operators(unet)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ModelError, match=r'"flahs".* Did you mean "flash"'):
        attention.use_backend(tiny_unet_sd15(), "flahs")


def test_foreign_processors_stay(caplog):
    class Foreign(attention.AttnProcessor2_0):
        pass

    unet = tiny_unet_sd15()
    unet.set_attn_processor(Foreign())
    assert attention.share_text(unet) == attention.use_backend(unet, "math") == 0
    assert not attention.shares_text(unet)
    assert "32 attention layers run as Foreign" in caplog.text


def test_shapes_are_those_the_network_runs(monkeypatch):
    seen = set()
    run = F.scaled_dot_product_attention

    def noted(query, key, value, **arguments):
        seen.add(AttentionShape(query.shape[1], query.shape[2], key.shape[2], query.shape[3]))
        return run(query, key, value, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for family in FAMILIES:
        seen.clear()
        predict, unet, cond = _problem(family)
        predict(unet, cond)
        assert attention_probe.attention_shapes(unet, 8, 8) == sorted(seen)


SHAPES = [AttentionShape(2, 64, 77, 8), AttentionShape(2, 63, 63, 8)]


def test_the_probe_leaves_out_kernels_that_are_missing(caplog):
    assert attention_probe.probe("cpu", torch.float32, SHAPES) == "default"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert attention_probe.fastest(("cudnn", "flash"), CPU, torch.float32, SHAPES) == "flash"
    assert len(caplog.records) == 1
    assert "cudnn: " in caplog.text
    assert attention_probe.fastest(("cudnn",), CPU, torch.float32, SHAPES) == "default"


def test_the_probe_leaves_out_kernels_that_are_wrong_and_takes_the_fastest(monkeypatch, caplog):
    run, clock = F.scaled_dot_product_attention, {"flash": 2.0, "math": 1.0}
    chosen = []
    monkeypatch.setattr(attention_probe, "_checked_seconds", _timed(attention_probe._checked_seconds, clock, chosen))
    assert attention_probe.fastest(("flash", "math"), CPU, torch.bfloat16, SHAPES) == "math"

    def wrong(query, key, value):
        output = run(query, key, value)
        return output * 1.1 if chosen[-1] == "math" and query.dtype == torch.bfloat16 else output

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    assert attention_probe.fastest(("flash", "math"), CPU, torch.bfloat16, SHAPES) == "flash"
    assert "math: output is off by 1.0e-01" in caplog.text


def _timed(check, clock, chosen):
    def run(name, *arguments):
        chosen.append(name)
        check(name, *arguments)
        return clock[name]

    return run
