"""Compiled networks compute what they did, and a compiler that fails costs one warning."""

import warnings
from functools import partial

import pytest
import torch

from diffalign.denoising import FrozenDenoiser, acceleration
from tests.denoising.conftest import predict

COMPILE = torch.compile


def broken_backend(graph, inputs):
    raise RuntimeError("no C++ compiler for this graph")


@pytest.fixture
def backend(monkeypatch):
    """Return a function that sets what torch.compile compiles with; the real one takes minutes."""

    def use(name):
        def compile_with(function, fullgraph, mode):
            return COMPILE(function, fullgraph=fullgraph, backend=name)

        monkeypatch.setattr(acceleration.torch, "compile", compile_with)

    yield use
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["regional", "full"])
def test_a_compiled_network_computes_the_same(unet, batch, cond, backend, how):
    backend("aot_eager")
    reference = predict(unet, batch.xt, batch.timesteps, cond)
    (gradient,) = torch.autograd.grad(reference.square().sum(), unet.conv_in.weight)
    names = list(unet.state_dict())
    state = acceleration.compile_network(unet, how)
    compiled = predict(unet, batch.xt, batch.timesteps, cond)
    (again,) = torch.autograd.grad(compiled.square().sum(), unet.conv_in.weight)
    assert not state.failed
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, reference)
    torch.testing.assert_close(again, gradient)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("how", ["regional", "full"])
def test_a_failing_compiler_is_one_warning(unet, batch, cond, backend, how):
    backend(broken_backend)
    expected = predict(unet, batch.xt, batch.timesteps, cond)
    state = acceleration.compile_network(unet, how)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler.*performance.compile: none"):
        got = predict(unet, batch.xt, batch.timesteps, cond)
    assert state.failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = predict(unet, batch.xt, batch.timesteps, cond)
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)


def test_an_error_of_the_caller_is_not_taken_for_the_compilers(unet, batch, cond, backend):
    backend("aot_eager")
    acceleration.compile_network(unet, "full")
    with pytest.raises(Exception, match=r"channels|shape|size"):
        predict(unet, batch.xt[:, :2], batch.timesteps, cond)


def test_none_compiles_nothing(unet):
    forward = unet.forward
    assert acceleration.compile_network(unet, "none") is None
    assert unet.forward == forward


@pytest.mark.parametrize(("wanted", "expected"), [(True, True), (False, False), (None, False)])
def test_channels_last_is_for_gpus_unless_asked_for(unet, batch, cond, wanted, expected):
    before = predict(unet, batch.xt, batch.timesteps, cond)
    acceleration.channels_last(unet, wanted)
    weight = unet.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected
    torch.testing.assert_close(predict(unet, batch.xt, batch.timesteps, cond), before, rtol=1e-4, atol=1e-5)


def test_padding_to_buckets_changes_no_prediction(unet, batch, cond):
    seen = []

    def counting(denoiser, xt, timesteps, cond):
        seen.append(len(xt))
        return predict(denoiser, xt, timesteps, cond)

    plain = FrozenDenoiser(unet, predict)(batch.xt, batch.timesteps, cond)
    padded = FrozenDenoiser(unet, counting, micro_batch_size=16, buckets=3)
    for count in (1, 3, len(batch.xt)):
        rows = torch.arange(count)
        got = padded(batch.xt[rows], batch.timesteps[rows], cond.select(rows))
        torch.testing.assert_close(got, plain[:count], rtol=1e-4, atol=1e-5)
    assert seen == [4, 4, next(size for size in (4, 8, 16) if size >= len(batch.xt))]


def test_a_lower_precision_is_close_and_asked_for(unet, batch, cond):
    exact = FrozenDenoiser(unet, predict)(batch.xt, batch.timesteps, cond)
    half = FrozenDenoiser(unet, predict, dtype=torch.bfloat16)(batch.xt, batch.timesteps, cond)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float8 may work here")
def test_float8_needs_a_gpu(unet):
    with pytest.raises(acceleration.ConfigError, match=r"reference_dtype.*needs a GPU.*Use bf16"):
        acceleration.to_float8(unet)


def test_cuda_graphs_are_left_out_without_a_gpu(unet, monkeypatch):
    monkeypatch.setattr(acceleration.torch.cuda, "is_available", lambda: False)
    assert acceleration.compile_network(unet, "full", cuda_graphs=True).mode is None
    monkeypatch.setattr(acceleration.torch.cuda, "is_available", lambda: True)
    compiled = partial(acceleration.compile_network, unet)
    assert compiled("full", cuda_graphs=True).mode == "reduce-overhead"
    assert compiled("regional", cuda_graphs=True).mode is None


class ReplayedGradient(torch.autograd.Function):
    """Write the gradient of a weight where the last one lies, as the replay of a captured backward pass does."""

    @staticmethod
    def forward(ctx, weight, place):
        ctx.place = place
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return torch.as_strided(ctx.place.add_(1), (3,), (1,)), None  # a tensor of its own, in memory that is not


def test_accumulated_gradients_survive_the_next_replay(monkeypatch):
    def captured(function, fullgraph, mode):
        places = torch.zeros(3)
        return lambda weight: ReplayedGradient.apply(weight, places)

    monkeypatch.setattr(acceleration.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(acceleration.torch, "compile", captured)
    network = torch.nn.Linear(3, 1, bias=False)
    network.weight = torch.nn.Parameter(torch.zeros(3))
    acceleration.compile_network(network, "full", cuda_graphs=True)
    for _ in range(2):  # micro-batches: gradients 1 and 2
        network.forward(network.weight).backward()
    assert network.weight.grad.tolist() == [3, 3, 3]
