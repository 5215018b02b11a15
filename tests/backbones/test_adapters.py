"""LoRA: starts as the base, switches off exactly, trains in float32, refuses nonsense."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffalign import backbones
from diffalign.backbones import adapters
from diffalign.errors import ModelError
from tests.backbones.drawing import perturb


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def backbone(request):
    return backbones.load(request.getfixturevalue(request.param))


def _predict(backbone):
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    cond = backbone.condition(backbone.encode_prompts(["a red circle", "a cat"]), sizes)
    xt = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return backbone.predict(backbone.denoiser, xt, torch.tensor([20, 700]), cond)


@pytest.mark.parametrize("init", sorted(adapters.INITS))
def test_starts_as_the_base_network(backbone, init):
    base = _predict(backbone)
    adapters.add_lora(backbone.denoiser, 4, init=init)
    assert torch.equal(_predict(backbone), base)


def test_adapters_off_is_the_base_bit_for_bit(backbone):
    base = _predict(backbone)
    perturb(adapters.add_lora(backbone.denoiser, 4))
    trained = _predict(backbone)
    assert (trained - base).abs().max() > 1e-3
    with adapters.adapters_off(backbone.denoiser):
        assert torch.equal(_predict(backbone), base)
    assert torch.equal(_predict(backbone), trained)


def test_adapters_return_after_an_exception(backbone):
    perturb(adapters.add_lora(backbone.denoiser, 4))
    trained = _predict(backbone)
    with pytest.raises(KeyError), adapters.adapters_off(backbone.denoiser):
        raise KeyError
    assert torch.equal(_predict(backbone), trained)


def test_the_switch_nests_and_works_repeatedly(backbone):
    base = _predict(backbone)
    perturb(adapters.add_lora(backbone.denoiser, 4))
    off = adapters.adapter_switch(backbone.denoiser)
    for _ in range(2):
        with off():
            with off():
                pass
            assert torch.equal(_predict(backbone), base)
        assert not torch.equal(_predict(backbone), base)


def test_the_switch_keeps_requires_grad_and_gradients(backbone):
    parameters = adapters.add_lora(backbone.denoiser, 4)
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    with adapters.adapters_off(backbone.denoiser):
        pass
    assert not parameters[0].requires_grad
    assert all(parameter.requires_grad for parameter in parameters[1:])
    assert parameters[1].grad.sum() > 0


def test_works_through_a_wrapper(backbone):
    perturb(adapters.add_lora(backbone.denoiser, 4))
    with adapters.adapters_off(torch.nn.Sequential(backbone.denoiser)):
        layers = [module for module in backbone.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        assert all(layer.disable_adapters for layer in layers)


def test_without_adapters_off_is_an_error(backbone):
    with pytest.raises(ModelError, match="no adapters"), adapters.adapters_off(backbone.denoiser):
        pass


def test_only_adapters_train_and_in_float32(tiny_sdxl):
    backbone = backbones.load(tiny_sdxl, torch_dtype=torch.bfloat16)
    parameters = adapters.add_lora(backbone.denoiser, 4)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert parameters == adapters.trainable_parameters(backbone.denoiser)
    names = [name for name, parameter in backbone.denoiser.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    # 9 attention levels x 2 attentions x 4 projections x A and B, two transformers on the lowest level
    assert len(names) == 272
    assert backbone.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert _predict(backbone).dtype == torch.bfloat16


def test_gradients_reach_every_adapter(backbone):
    parameters = adapters.add_lora(backbone.denoiser, 4)
    perturb(parameters)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]])
    cond = backbone.condition(backbone.encode_prompts(["a red circle"]), sizes)
    pred = backbone.predict(backbone.denoiser, torch.randn(1, 4, 16, 16), torch.tensor([300]), cond)
    pred.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)


def test_alpha_scales_the_update(tiny_sd15):
    differences = []
    for alpha in (4, 8):
        backbone = backbones.load(tiny_sd15)
        base = _predict(backbone)
        perturb(adapters.add_lora(backbone.denoiser, 4, alpha=alpha, target_modules=["conv_out"]))
        differences.append(_predict(backbone) - base)
    torch.testing.assert_close(differences[1], 2 * differences[0], rtol=1e-3, atol=1e-5)
    assert differences[0].abs().max() > 1e-3


def test_seed_decides_the_start_and_leaves_the_global_generator_alone(tiny_sd15):
    def lora(seed, dtype=torch.float32):
        denoiser = backbones.load(tiny_sd15, torch_dtype=dtype).denoiser
        return adapters.add_lora(denoiser, 4, seed=seed)[0]

    state = torch.get_rng_state()
    first = lora(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, lora(1))
    assert torch.equal(first, lora(1, torch.bfloat16))
    assert not torch.equal(first, lora(2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 0}, "got 0"),
        ({"rank": True}, "got True"),
        ({"rank": 4.0}, "got 4.0"),
        ({"rank": 4, "alpha": 0}, "got 0"),
        ({"rank": 4, "dropout": 1.0}, "got 1.0"),
        ({"rank": 4, "init": "gausian"}, 'Did you mean "gaussian"'),
        ({"rank": 4, "target_modules": []}, "empty"),
        ({"rank": 4, "target_modules": ["to_q", "to_kk"]}, '"to_kk" matches no'),
        ({"rank": 4, "target_modules": ["norm1"]}, '"norm1" matches no'),
    ],
)
def test_wrong_arguments_change_nothing(tiny_sd15, arguments, named):
    denoiser = backbones.load(tiny_sd15).denoiser
    with pytest.raises(ModelError, match=named):
        adapters.add_lora(denoiser, **arguments)
    assert not adapters.has_adapters(denoiser)
    assert len(adapters.trainable_parameters(denoiser)) == len(list(denoiser.parameters()))


def test_a_second_lora_is_refused(tiny_sd15):
    denoiser = backbones.load(tiny_sd15).denoiser
    adapters.add_lora(denoiser, 4)
    with pytest.raises(ModelError, match="adapters already"):
        adapters.add_lora(denoiser, 4)


def test_freeze_returns_the_module_and_keeps_its_mode(tiny_sd15):
    denoiser = backbones.load(tiny_sd15).denoiser.train()
    assert adapters.freeze(denoiser) is denoiser
    assert adapters.trainable_parameters(denoiser) == []
    assert denoiser.training
