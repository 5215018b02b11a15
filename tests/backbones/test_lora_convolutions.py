"""LoRA convolutions without peft's detour through float32: peft's numbers, in the precision of the network."""

import copy

import torch
from peft.tuners.lora import Conv2d

from diffalign.backbones import adapters
from diffalign.backbones.fused_lora import DirectConv2d, fuse_lora
from tests.backbones.drawing import perturb
from tests.backbones.test_fused_lora import _step, _worst
from tests.tiny import tiny_unet_sdxl


def test_convolutions_are_pefts_too():
    torch.manual_seed(0)
    unet = tiny_unet_sdxl()
    targets = ["conv1", "conv2", "conv_shortcut", "conv"]  # 3x3, 1x1 and strided ones
    perturb(adapters.add_lora(unet, 4, target_modules=targets), scale=0.05)
    direct = copy.deepcopy(unet)
    count = sum(isinstance(module, Conv2d) for module in unet.modules())
    assert fuse_lora(direct) == count > 0
    assert _worst(_step(direct), _step(unet)) < 1e-5


def test_convolutions_run_in_the_precision_of_a_bfloat16_network():
    torch.manual_seed(0)
    unet = tiny_unet_sdxl().bfloat16()
    adapters.add_lora(unet, 4, target_modules=["conv1"])
    fuse_lora(unet)
    layer = next(module for module in unet.modules() if isinstance(module, DirectConv2d))
    x = torch.randn(2, layer.base_layer.in_channels, 8, 8).bfloat16()
    with adapters.adapters_off(unet), torch.no_grad():
        base = layer(x)
    assert torch.equal(layer(x), base)
    perturb(adapters.trainable_parameters(unet), scale=0.05)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert not torch.equal(y, base)
    (gradient,) = torch.autograd.grad(y.float().square().mean(), layer.lora_A["default"].weight)
    assert gradient.dtype == torch.float32
