"""A base in few bits: the formats of diffusers, gradients, the first logit, and memory as it is counted."""

import copy

import pytest
import torch
from diffusers import TorchAoConfig
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from diffalign.backbones import adapters, quantization
from diffalign.backbones.adapters import adapters_off
from diffalign.backbones.base import move
from diffalign.backbones.fused_lora import FusedLinear, fuse_lora
from diffalign.errors import ConfigError
from tests.backbones.drawing import perturb
from tests.tiny import tiny_transformer_flux, tiny_transformer_sd3, tiny_transformer_zimage, tiny_unet_sdxl

# Relative error of the weights of a normal distribution: measured 0.0068, 0.026 and 0.093 on [192,128] in bfloat16.
KINDS = {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}
NETWORKS = {
    "sd3": tiny_transformer_sd3,
    "sdxl": tiny_unet_sdxl,
    "flux": tiny_transformer_flux,
    "zimage": tiny_transformer_zimage,
}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(quantization.PACKAGES[request.param])
    return request.param


def distance(value, expected):
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def linear(dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(128, 192, bias=bias)
    nn.init.normal_(layer.weight)
    return layer.to(dtype)


def quantized(kind, layer):
    quantization.quantize(nn.Sequential(layer), kind, "cpu")
    return layer


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_dense_layer_of_its_weights(kind, dtype, bias):
    original = linear(dtype, bias)
    layer = quantized(kind, copy.deepcopy(original))
    dense = copy.deepcopy(original).requires_grad_(False)
    dense.weight.data = layer.dense(dtype)
    assert 0 < distance(dense.weight, original.weight) < KINDS[kind]
    x = torch.randn(3, 5, 128, dtype=dtype)
    (y, grad), (expected, expected_grad) = gradients(layer, x), gradients(dense, x)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)
    assert y.dtype == grad.dtype == dtype
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_autocast_decides_about_the_products(kind):
    layer = quantized(kind, linear(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 128)).dtype == torch.bfloat16
    assert layer(torch.randn(4, 128)).dtype == torch.float32


def held(layer):
    """Return the bytes of all tensors that a layer's weight holds on to."""
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None:
        tensors = [weight.qdata, weight.scale, weight.zero_point if hasattr(weight, "zero_point") else None]
    else:
        tensors = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in tensors if part is not None)


@pytest.mark.parametrize("shape", [(128, 192), (48, 20), (1000, 3)])
def test_the_bytes_of_a_layer_are_counted(kind, shape):
    layer = quantized(kind, nn.Linear(*shape, dtype=torch.bfloat16))
    assert quantization.stored_bytes(layer, kind) == held(layer)


def test_nf4_takes_four_bits_and_an_eighth():
    layer = nn.Linear(4096, 4096, device="meta")
    bits = 8 * (quantization.stored_bytes(layer, "nf4") - quantization.NF4_TABLES) / 4096**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)


@pytest.mark.parametrize("network", NETWORKS)
def test_all_linear_layers_are_quantised_and_nothing_else(kind, network):
    denoiser = NETWORKS[network]()
    move(denoiser, dtype=torch.bfloat16)
    before = {name: part for name, part in denoiser.named_modules() if isinstance(part, nn.Linear)}
    others = {name: p.clone() for name, p in denoiser.named_parameters() if name.removesuffix(".weight") not in before}
    assert quantization.quantize(denoiser, kind, "cpu") == len(before)
    assert all(type(part) is quantization.QuantizedLinear for part in before.values())
    assert quantization.dtype_of(denoiser) == torch.bfloat16
    kept = dict(denoiser.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in others.items())
    assert not any(kept[f"{name}.weight"].requires_grad for name in before)


@pytest.mark.parametrize("network", ["sd3", "flux"])
def test_diffusers_own_loading_gives_the_same_weights(network, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    original = NETWORKS[network]()
    move(original, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path)
    for kind, config in (("int8", Int8WeightOnlyConfig()), ("fp8", Float8WeightOnlyConfig())):
        ours = copy.deepcopy(original)
        quantization.quantize(ours, kind, "cpu")
        theirs = type(original).from_pretrained(
            tmp_path, torch_dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
        )
        weights = {name: p for name, p in theirs.named_parameters() if hasattr(p, "dequantize") and hasattr(p, "qdata")}
        assert weights.keys() == {f"{name}.weight" for name, _ in quantization.linear_layers(ours)}
        for name, weight in weights.items():
            mine = ours.get_parameter(name)
            assert torch.equal(mine.qdata.float(), weight.qdata.float())
            assert torch.equal(mine.scale, weight.scale)


def adapted(kind, scale=0.0, fused=True):
    torch.manual_seed(0)
    denoiser = tiny_transformer_sd3()
    move(denoiser, dtype=torch.bfloat16)
    if kind is not None:
        quantization.quantize(denoiser, kind, "cpu")
    trained = adapters.add_lora(denoiser, 4, target_modules=("to_q", "to_k", "to_v"))
    if scale:
        perturb(trained, scale=scale)
    if fused:
        assert fuse_lora(denoiser) > 0
    return denoiser


def predict(denoiser):
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator) for shape in ((2, 16, 16, 16), (2, 20, 32), (2, 64))]
    xt, text, pooled = (part.to(torch.bfloat16) for part in given)
    timesteps = torch.tensor([200.0, 800.0])
    return denoiser(xt, text, pooled, timesteps, return_dict=False)[0]


def test_adapters_off_are_the_bits_of_new_adapters(kind):
    denoiser = adapted(kind)
    assert any(isinstance(part, FusedLinear) for part in denoiser.modules())
    policy = predict(denoiser)
    with adapters_off(denoiser), torch.no_grad():
        reference = predict(denoiser)
    assert torch.equal(policy, reference)
    perturb(adapters.trainable_parameters(denoiser), scale=0.1)
    assert not torch.equal(predict(denoiser), reference)
    with adapters_off(denoiser), torch.no_grad():
        assert torch.equal(predict(denoiser), reference)


def test_fused_adapters_learn_what_pefts_would(kind):
    found = {}
    for fused in (True, False):
        denoiser = adapted(kind, scale=0.05, fused=fused)
        predict(denoiser).float().square().mean().backward()
        found[fused] = {name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad}
    assert found[True].keys() == found[False].keys()
    assert all(gradient.abs().sum() > 0 for gradient in found[False].values())
    worst = max(distance(found[True][name], gradient) for name, gradient in found[False].items())
    assert worst < 0.05  # products and sums of bfloat16 in another order


# Measured on random weights: 0.0064, 0.0248 and 0.1036.
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.05), ("nf4", 0.15)])
def test_predictions_stay_close_to_those_of_the_base(kind, most):
    pytest.importorskip(quantization.PACKAGES[kind])
    with torch.no_grad():
        error = distance(predict(adapted(kind)), predict(adapted(None)))
    assert 0.001 < error < most


def saved_shapes(network, x):
    """Return the shapes of what a pass keeps for the backward pass."""
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x.requires_grad_())
    return shapes


@pytest.mark.parametrize("lora", [True, False])
def test_no_dense_weight_is_kept_for_the_backward_pass(kind, lora):
    x, dense = torch.randn(5, 128, dtype=torch.bfloat16), {(192, 128), (128, 192)}
    original = linear().requires_grad_(False)
    assert not dense.isdisjoint(saved_shapes(original, x))
    layer = quantized(kind, original)
    if lora:
        layer = PeftLinear(layer, "default", LoraConfig(r=4), r=4)
        assert fuse_lora(nn.Sequential(layer)) == 1
    assert dense.isdisjoint(saved_shapes(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_its_remedy(kind, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    remedy = rf'"{kind}" needs {quantization.PACKAGES[kind]}: pip install "diffalign\[quant\]"'
    with pytest.raises(ConfigError, match=remedy):
        quantization.quantize(nn.Sequential(nn.Linear(2, 2)), kind, "cpu")
