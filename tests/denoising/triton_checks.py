"""Triton's kernels against torch, on a GPU or in Triton's interpreter: test_kernels_triton.py runs this file.

Whether kernels are compiled or interpreted is settled when Triton is imported, so that each takes a process of its own.
"""

import os

import pytest
import torch

from diffalign import objectives
from diffalign.denoising import DDPMPath, FlowPath, draws, independent, kernels, normal, uniform
from diffalign.objectives.base import PairErrors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
IDS = torch.tensor([7, 0, 2**32 + 7, 2**62 + 11], device=DEVICE)
SHAPES = [(3, 4, 5, 7), (2, 4, 40, 40), (1, 1, 1, 1), (3, 9)]  # less than a block, several, one number, no image


def by_both(function):
    """Return what a function gives with torch's kernels and with Triton's."""
    results = []
    for name in ("torch", "triton"):
        with kernels.using(name):
            assert (kernels.triton_for(IDS) is not None) == (name == "triton")
            results.append(function())
    return results


def latents(seed, shape):
    return normal(seed, 0, torch.arange(shape[0], device=DEVICE), shape[1:])


def bfloat16(exact):
    """Round to bfloat16 as the device does: Triton's interpreter drops the digits."""
    return (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16() if INTERPRETED else exact.bfloat16()


@pytest.mark.parametrize(("seed", "step", "stream"), [(0, 0, "noise"), (2**32 - 1, 2**32 - 1, "noise_l"), (1, 16, "x")])
@pytest.mark.parametrize("blocks", [1, 5, 1025])
def test_the_random_words_are_the_same(seed, step, stream, blocks):
    key = draws._key(seed, step, IDS, stream)
    expected, got = by_both(lambda: draws._philox_words(key, step, IDS, blocks))
    for word, same in zip(expected, got, strict=True):
        assert word.shape == same.shape == (4, blocks)
        assert torch.equal(word, same)
    assert len(torch.stack(expected).unique()) > 15 * blocks


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 4099])
def test_normal_numbers_differ_by_one_unit_in_the_last_place_at_most(count):
    expected, got = by_both(lambda: normal(3, 11, IDS, (count,)))
    assert got.shape == (4, count)
    assert got.dtype == torch.float32
    assert (expected.view(torch.int32) - got.view(torch.int32)).abs().max() <= 1


def test_uniform_numbers_are_the_same():
    expected, got = by_both(lambda: uniform(3, 11, IDS, "timesteps"))
    assert torch.equal(expected, got)


def test_no_examples_no_numbers():
    for values in by_both(lambda: (normal(0, 0, IDS[:0], (4, 3)), uniform(0, 0, IDS[:0], "x"))):
        assert [tuple(value.shape) for value in values] == [(0, 4, 3), (0,)]


def test_ids_may_be_a_view():
    expected, got = by_both(lambda: normal(0, 0, IDS[::2], (5,)))
    torch.testing.assert_close(expected, got, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_noisy_latents_and_targets(prediction_type, dtype):
    flow = prediction_type == "flow_prediction"
    path = FlowPath() if flow else DDPMPath(torch.linspace(0.99, 0.01, 100), prediction_type)
    timesteps, ids = torch.tensor([3.25, 996.5] if flow else [3, 96], device=DEVICE), IDS[:2]
    x0 = latents(4, (4, 4, 19, 23)).to(memory_format=torch.channels_last)
    noised = by_both(lambda: independent(path, x0, timesteps, 0, 0, ids, dtype))
    full = independent(path, x0, timesteps, 0, 0, ids)
    torch.testing.assert_close(noised[1].target, noised[0].target, rtol=0, atol=1e-6)
    assert noised[1].xt.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(noised[1].xt, noised[0].xt, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(noised[1].xt, bfloat16(full.xt), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_and_their_gradient(shape, dtype, layout):
    pred, target = latents(1, shape).to(dtype), latents(2, shape)
    if layout == "channels last" and len(shape) == 4:
        pred = pred.to(memory_format=torch.channels_last)
    if layout == "view":
        pred = torch.cat([pred, pred], dim=1)[:, shape[1] :]
    weights = torch.arange(1.0, shape[0] + 1, device=DEVICE)

    def measure():
        policy = pred.detach().requires_grad_()
        errors, reference = kernels.squared_errors(policy, target, pred.float().contiguous())
        assert torch.equal(errors, reference)
        (errors * weights).sum().backward()
        return errors.detach(), policy.grad

    (expected, _), (errors, gradient) = by_both(measure)
    torch.testing.assert_close(errors, expected, rtol=1e-6, atol=0)
    assert gradient.dtype == dtype
    assert gradient.stride() == pred.stride() or layout == "view"
    slopes = (weights * (2 / target[0].numel())).view(-1, *(1 for _ in shape[1:]))
    exact = (pred.float() - target) * slopes
    if dtype == torch.float32:
        torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(gradient, bfloat16(exact), rtol=2**-7, atol=0)
        assert (gradient == bfloat16(exact)).float().mean() > 0.99  # or neighbours, where float32 rounds differently


def test_errors_do_not_change_from_run_to_run_or_with_the_batch():
    pred, target = latents(1, (4, 4, 40, 40)), latents(2, (4, 4, 40, 40))
    with kernels.using("triton"):
        first, _ = kernels.squared_errors(pred, target)
        again, _ = kernels.squared_errors(pred, target)
        alone = torch.cat([kernels.squared_errors(pred[[row]], target[[row]])[0] for row in range(4)])
        empty, none = kernels.squared_errors(pred[:0], target[:0])
    assert torch.equal(first, again)
    assert torch.equal(first, alone)
    assert len(first.unique()) == 4
    assert empty.shape == (0,)
    assert none is None


def test_the_gradient_of_a_mean_of_losses_comes_through():
    pred, target = latents(1, (4, 4, 8, 8)), latents(2, (4, 4, 8, 8))

    def gradient():
        policy = pred.detach().requires_grad_()
        errors, reference = kernels.squared_errors(policy, target, pred * 1.01)
        pairs = PairErrors(
            policy_w=errors[:2], policy_l=errors[2:], reference_w=reference[:2], reference_l=reference[2:]
        )
        objectives.load("dpo").loss(pairs).mean().backward()
        return policy.grad

    expected, got = by_both(gradient)
    assert got.abs().min() < got.abs().max()
    torch.testing.assert_close(
        got, expected, rtol=1e-3, atol=0
    )  # beta 5000 turns 1e-7 of an error into 1e-4 of a logit


def test_double_precision_is_left_to_torch():
    pred, target = latents(1, (2, 4, 8, 8)).double(), latents(2, (2, 4, 8, 8))
    expected, got = by_both(lambda: kernels.squared_errors(pred, target)[0])
    assert got.dtype == torch.float64
    assert torch.equal(expected, got)


def exactly(function, *inputs):
    """Return the output and the gradients of the mathematics, in float64 and plain torch, and the incoming gradient."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    incoming = latents(9, tuple(output.shape)).to(torch.bfloat16)
    return [output.detach(), *torch.autograd.grad(output, inputs, incoming.double())], incoming


def with_triton(function, incoming, *inputs):
    """Return the output and the gradients that the kernels give."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with kernels.using("triton"):
        output = function(*inputs)
        incoming = torch.empty_like(output).copy_(incoming)
        return [output.detach(), *torch.autograd.grad(output, inputs, incoming)]


def assert_rounded_once(got, exact):
    """In bfloat16 the digits after the last are dropped by Triton's interpreter: two roundings' worth of room."""
    for value, right in zip(got, exact, strict=True):
        size = right.abs().max().item()
        rtol, atol = (2**-7, 1e-5) if value.dtype == torch.bfloat16 else (1e-5, 3e-6)
        torch.testing.assert_close(value.double(), right, rtol=rtol, atol=atol * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 74), (2, 2 * 1500), (1, 2)])
def test_geglu_and_its_gradient(shape, dtype):
    projected = (3 * latents(1, shape)).to(dtype)

    def plain(projected):
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * torch.nn.functional.gelu(gate)

    exact, incoming = exactly(plain, projected)
    got = with_triton(kernels.geglu, incoming, projected)
    assert [value.dtype for value in got] == [dtype] * 2
    assert_rounded_once(got, exact)
    view = torch.cat([projected, projected], dim=-1)[..., : shape[-1]]
    assert_rounded_once(with_triton(kernels.geglu, incoming, view), exact)


# Of 64 x 64 and 4 x 1024 numbers a program: less than one tile; several, and more chunks than are added up at a time;
# more channels than a tile; one pixel.
MAPS = [((2, 24, 9, 7), 8), ((1, 4, 34, 32), 2), ((2, 130, 3, 2), 13), ((1, 16, 1, 1), 2)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), MAPS)
def test_group_norm_with_silu_and_its_gradients(shape, groups, dtype, layout):
    x = (3 + 2 * latents(1, shape)).to(dtype).to(memory_format=layout)
    weight, bias = latents(2, (2, shape[1])).to(dtype)

    def plain(x, weight, bias):
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, weight, bias, 1e-5))

    def fused(x, weight, bias):
        return kernels.group_norm_silu(x, weight, bias, groups, 1e-5)

    exact, incoming = exactly(plain, x, weight, bias)
    got = with_triton(fused, incoming, x, weight, bias)
    assert [value.dtype for value in got] == [dtype] * 4
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()
    assert_rounded_once(got, exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activations_do_not_change_from_run_to_run_or_with_the_batch(layout):
    x, (weight, bias) = latents(1, (2, 8, 12, 12)).to(memory_format=layout), latents(2, (2, 8))

    def gradient(x):
        x = x.detach().requires_grad_()
        with kernels.using("triton"):
            output = kernels.group_norm_silu(x, weight, bias, 4, 1e-5)
            output.square().sum().backward()
        return torch.cat([output.detach(), x.grad])

    together, again = gradient(x), gradient(x)
    assert torch.equal(together, again)
    assert torch.equal(gradient(x[[1]]), together[1::2])
    assert len(together.unique()) > together.numel() / 2


def test_a_group_far_from_zero_keeps_its_digits():
    x = 1000 + latents(1, (1, 4, 40, 40))
    exact, incoming = exactly(lambda x: torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)), x)
    one, zero = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    got = with_triton(lambda x: kernels.group_norm_silu(x, one, zero, 2, 1e-5), incoming, x)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-3, atol=1e-3)  # of x itself 6e-5 is left


def test_frozen_weights_and_inputs_cost_no_gradient():
    """As under autocast, the map is bfloat16 and the weights are float32."""
    x, (weight, bias) = latents(1, (2, 8, 5, 5)).bfloat16(), latents(2, (2, 8))
    expected, incoming = exactly(
        lambda x: torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, weight.double(), bias.double())), x
    )
    assert_rounded_once(with_triton(lambda x: kernels.group_norm_silu(x, weight, bias, 4, 1e-5), incoming, x), expected)
    expected, incoming = exactly(
        lambda bias: torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias)),
        bias,
    )
    got = with_triton(lambda bias: kernels.group_norm_silu(x, weight, bias, 4, 1e-5), incoming, bias)
    assert_rounded_once(got, expected)


def test_activations_in_double_precision_are_left_to_torch():
    expected, got = by_both(lambda: kernels.geglu(latents(1, (2, 8)).double()))
    assert torch.equal(expected, got)
