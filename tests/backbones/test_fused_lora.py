"""Fused LoRA layers: peft's numbers and gradients, the frozen layer's bits, and peft's own way where needed."""

import copy
import logging
from functools import partial

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from diffalign.backbones import adapters
from diffalign.backbones.attention import use_backend
from diffalign.backbones.export import save_lora
from diffalign.backbones.fused_lora import FusedLinear, fuse_lora, project
from diffalign.training.moving_reference import MovingReference
from tests.backbones.drawing import perturb
from tests.tiny import tiny_unet_sd15, tiny_unet_sdxl

LAYERS = 136  # 272 parameters in the attention layers of the tiny SDXL UNet, A and B


def _unet(scale=0.05, alpha=8, **arguments):
    torch.manual_seed(0)
    unet = tiny_unet_sdxl()
    perturb(adapters.add_lora(unet, 4, alpha=alpha, **arguments), scale=scale)
    return unet


def _predict(unet, xt=None):
    generator = torch.Generator().manual_seed(3)
    xt = torch.randn(4, 4, 8, 8, generator=generator) if xt is None else xt
    added = {"text_embeds": torch.ones(4, 32), "time_ids": torch.ones(4, 6)}
    text = torch.randn(4, 77, 48, generator=generator)
    return unet(xt, torch.tensor([1, 300, 500, 900]), text, added_cond_kwargs=added, return_dict=False)[0]


def _step(unet, autocast=False):
    """Return the prediction, its gradient with respect to the latents, and those of the adapters by name."""
    xt = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pred = _predict(unet, xt)
    pred.float().square().mean().backward()
    return pred.detach(), xt.grad, {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}


def _distance(value, expected):
    return ((value.float() - expected).norm() / expected.norm()).item()


def _worst(step, expected):
    gradients = [_distance(step[2][name], gradient) for name, gradient in expected[2].items()]
    return max(_distance(step[0], expected[0]), _distance(step[1], expected[1]), *gradients)


def test_predictions_and_all_gradients_are_pefts():
    unet = _unet()
    layerwise = copy.deepcopy(unet)
    assert fuse_lora(layerwise) == LAYERS
    grouped = copy.deepcopy(layerwise)
    assert use_backend(grouped) == LAYERS / 4
    expected = _step(unet)
    assert all(gradient.abs().sum() > 0 for gradient in expected[2].values())
    assert _worst(_step(layerwise), expected) < 1e-5
    assert _worst(_step(grouped), expected) < 1e-5


def test_under_autocast_it_is_as_close_to_float32_as_peft():
    unet = _unet()
    fused = copy.deepcopy(unet)
    fuse_lora(fused)
    use_backend(fused)
    expected = _step(copy.deepcopy(unet))
    step, peft = _step(fused, autocast=True), _step(unet, autocast=True)
    assert step[0].dtype == peft[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in step[2].values())
    assert 0 < _worst(step, expected) < 1.5 * _worst(peft, expected)


def test_in_a_bfloat16_network_it_is_as_close_to_float32_as_peft():
    unet = _unet()
    exact = next(module for module in unet.modules() if isinstance(module, Linear) and module.in_features == 32)
    peft = copy.deepcopy(exact)
    peft.base_layer.bfloat16()
    x = torch.randn(2, 9, 32).bfloat16().float()

    def gradients(layer, dtype):
        own = x.to(dtype).requires_grad_()
        y = layer(own)
        wanted = [own, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), wanted)]

    expected, errors = gradients(exact, torch.float32), []
    for kind in (Linear, FusedLinear):
        peft.__class__ = kind
        values = gradients(peft, torch.bfloat16)
        assert [value.dtype for value in values] == [torch.bfloat16] * 2 + [torch.float32] * 2
        errors.append(max(_distance(value, right) for value, right in zip(values, expected, strict=True)))
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_bits_of_the_frozen_network(dtype):
    torch.manual_seed(0)
    unet = tiny_unet_sdxl().to(dtype)
    adapters.add_lora(unet, 4)
    fuse_lora(unet)
    for _ in range(2):  # one layer a function, then one function an attention
        xt = torch.randn(4, 4, 8, 8).to(dtype)
        pred = unet(xt, 7, torch.ones(4, 77, 48, dtype=dtype), added_cond_kwargs=_added(dtype)).sample
        with adapters.adapters_off(unet), torch.no_grad():
            base = unet(xt, 7, torch.ones(4, 77, 48, dtype=dtype), added_cond_kwargs=_added(dtype)).sample
        assert pred.requires_grad
        assert torch.equal(pred, base)
        use_backend(unet)


def _added(dtype):
    return {"text_embeds": torch.ones(4, 32, dtype=dtype), "time_ids": torch.ones(4, 6)}


def test_a_switch_made_before_still_works():
    unet = _unet()
    switch = adapters.adapter_switch(unet)
    with torch.no_grad():
        with switch():
            base = _predict(unet)
        fuse_lora(unet)
        with switch():
            assert torch.equal(_predict(unet), base)
        assert _distance(_predict(unet), base) > 1e-3


def test_saves_only_the_input_and_the_low_rank_product():
    def bytes_saved(layer):
        kept = {}
        x = torch.randn(64, 32, requires_grad=True)
        own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
            y = layer(x)
        y.sum().backward()
        return sum(t.numel() for pointer, t in kept.items() if pointer not in own)

    layer = next(m for m in _unet().modules() if isinstance(m, Linear) and m.in_features == 32)
    peft = bytes_saved(layer)
    layer.__class__ = FusedLinear
    assert bytes_saved(layer) == 64 * 4 <= peft


def test_computes_no_gradient_that_nobody_needs():
    unet = _unet(alpha=4)
    fuse_lora(unet)
    layer = next(module for module in unet.modules() if isinstance(module, FusedLinear))
    layer.lora_A["default"].weight.requires_grad_(False)
    x = torch.randn(2, layer.in_features)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None
    products = {event.key: event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_")}
    assert products == {"aten::mm": 3, "aten::addmm_": 1}  # x W^T, x A^T, (x A^T) B^T; for B's gradient one


def test_checkpointing_changes_no_gradient():
    unet = _unet()
    fuse_lora(unet)
    use_backend(unet)
    expected = _step(copy.deepcopy(unet))
    unet.enable_gradient_checkpointing()
    unet.train()
    assert _worst(_step(unet), expected) < 1e-6


def test_selective_checkpointing_changes_no_gradient():
    unet = _unet()
    fuse_lora(unet)
    use_backend(unet)
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    x, text = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 7, 48)
    # The products are kept: adding to them in place would spoil them.
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    outputs = (
        block(x, encoder_hidden_states=text),
        checkpoint(block, x, None, text, use_reentrant=False, context_fn=contexts),
    )
    wanted = [x, *adapters.trainable_parameters(block)]
    expected, gradients = (torch.autograd.grad(output.square().mean(), wanted) for output in outputs)
    for value, right in zip(gradients, expected, strict=True):
        assert _distance(value, right) < 1e-5


def test_a_moving_reference_exchanges_the_weights():
    unet = _unet()
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    moving = MovingReference(trained, "ema", 0.5, 1)
    fuse_lora(unet)
    with torch.no_grad():
        start = _predict(unet)
        perturb(trained.values(), seed=9)
        moved = _predict(unet)
        with moving.lent():
            assert torch.equal(_predict(unet), start)
        assert torch.equal(_predict(unet), moved)
        assert not torch.equal(moved, start)


def test_saved_adapters_are_the_same(tmp_path):
    unet = _unet()
    before = load_file(save_lora(unet, tmp_path / "peft"))
    fuse_lora(unet)
    after = load_file(save_lora(unet, tmp_path / "fused"))
    assert len(after) == 2 * LAYERS
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_it_does_not_cover_keeps_pefts_pass(caplog):
    with caplog.at_level(logging.INFO):
        assert fuse_lora(_unet(dropout=0.1)) == 0
    assert f"{LAYERS} layers keep peft's" in caplog.text
    dora = tiny_unet_sd15()
    dora.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    assert fuse_lora(dora) == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_add_up_as_with_peft():
    unet = _unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="second")
    adapters.activate(unet, ["default", "second"])
    fused = copy.deepcopy(unet)
    fuse_lora(fused)
    use_backend(fused)
    with torch.no_grad():
        assert _distance(_predict(fused), _predict(unet)) < 1e-5


def test_merged_and_scaled_adapters_act_as_with_peft():
    unet = _unet()
    fused = copy.deepcopy(unet)
    fuse_lora(fused)
    with torch.no_grad():
        with adapters.adapter_mix(unet, {"default": 0.3})(), adapters.adapter_mix(fused, {"default": 0.3})():
            assert _distance(_predict(fused), _predict(unet)) < 1e-5
        unet.fuse_lora()
        fused.fuse_lora()
        assert _distance(_predict(fused), _predict(unet)) < 1e-5


def test_layers_of_different_ranks_share_one_function():
    unet = tiny_unet_sdxl()
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v"], rank_pattern={"to_k": 2}))
    perturb(adapters.trainable_parameters(unet))
    adapters.freeze(unet)
    attn = next(module for module in unet.modules() if hasattr(module, "to_k"))
    x = torch.randn(2, 5, attn.to_k.in_features)
    expected = attn.to_k(x), attn.to_v(x)
    fuse_lora(unet)
    for value, right in zip(project((attn.to_k, attn.to_v), x), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


def test_compiles_without_graph_breaks_into_one_graph_a_switch_position():
    unet = _unet()
    fuse_lora(unet)
    use_backend(unet)
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    switch = adapters.adapter_switch(unet)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def passes(run):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        text = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(2))
        with switch(), torch.no_grad():
            base = run(x, encoder_hidden_states=text)
        trained = run(x, encoder_hidden_states=text)
        return [
            base,
            trained,
            *torch.autograd.grad(trained.square().mean(), [x, *adapters.trainable_parameters(block)]),
        ]

    expected = passes(block)
    for _ in range(2):
        for value, right in zip(passes(torch.compile(block, fullgraph=True, backend=backend)), expected, strict=True):
            assert _distance(value, right) < 1e-5
    assert len(graphs) == 2
