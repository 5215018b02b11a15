"""A micro-step never waits for the device: what the device computed is not read, what it is given is not waited for.

The meta device stands for the GPU. It has no numbers, so everything that would read one (`item`, `tolist`, `cpu`, a
condition, a mask as an index) is an error there. Copies to it are looked at one by one.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import denoising, objectives
from diffalign.training.auto_beta import AutoBeta
from tests.training.micro_steps import OFFLINE, Latents, Parts

INDICES = [3, 1, 4]
DEVICE = torch.device("meta")


class NoBlockingCopies(TorchDispatchMode):
    """Refuse copies to the device that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            moved = source.device.type == "cpu" and result.device.type == "meta"
            assert not moved or (kwargs or {}).get("non_blocking"), f"the host waits for {func} of {source.shape}"
        return result


@pytest.fixture(scope="module")
def parts(tiny_sdxl):
    """Return a network on the device."""
    parts = Parts.of(tiny_sdxl)
    parts.backbone.denoiser.to(DEVICE)
    parts.backbone.path.alpha_sigma(torch.zeros(1, dtype=torch.int64, device=DEVICE))  # its table moves once a run
    return parts


@pytest.fixture(autouse=True)
def _no_numbers_on_the_device(monkeypatch):
    """Refuse `torch.tensor` on the device: the host would wait for the copy, which is hidden there."""

    def on_the_host(make):
        def checked(*args, device=None, **kwargs):
            there = isinstance(args[0], torch.Tensor) and args[0].device == device
            assert there or torch.device(device or "cpu").type == "cpu", f"{make.__name__} copies to the device"
            return args[0] if there else make(*args, **kwargs)

        return checked

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, on_the_host(getattr(torch, name)))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # raises for this device


def take(step):
    """Take a micro-step on the device and return its losses and metrics."""
    network = step.backbone.denoiser
    network.zero_grad()
    with NoBlockingCopies():
        losses, metrics = step(network, INDICES, 7)
        losses.mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
    return losses, metrics


@pytest.mark.parametrize("name", OFFLINE)
def test_no_objective_waits(name, parts):
    # An inversion reads its timesteps, once for all micro-steps of an optimizer step.
    losses, metrics = take(parts.step(name, noising="shared"))
    assert losses.shape == (3,)
    assert {values.device for values in metrics.values()} == {DEVICE}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("dpo", {"snr_gamma": 5.0}),
        ("dpo", {"anchor_weight": 0.1}),
        ("dpo", {"sft_weight": 0.1}),
        ("dpo", {"noising": "independent"}),
        ("dpo", {"auto_beta": AutoBeta(0.2)}),
        ("kto", {"objective": objectives.load("kto", baseline="mismatched")}),
        ("kto", {"objective": objectives.load("kto", baseline="class_mean", utility="risk_seeking_2")}),
        ("rankdpo", {"pairs": Latents(2, scored=False)}),
    ],
    ids=["min_snr", "anchor", "sft", "independent", "auto_beta", "mismatched", "class_mean", "two ranks"],
)
def test_no_option_waits(name, option, parts):
    assert take(parts.step(name, **option))[0].shape == (3,)


def test_a_flow_path_does_not_wait(parts, monkeypatch):
    monkeypatch.setattr(parts.backbone, "path", denoising.FlowPath())
    assert take(parts.step("dpo", snr_gamma=5.0))[0].shape == (3,)


@pytest.mark.parametrize(("name", "settings"), [("logit_normal", {}), ("mode", {}), ("list", {"values": (801, 338)})])
def test_no_density_waits(name, settings):
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    sampling = denoising.TimestepSampling(denoising.DENSITIES[name](**settings), denoising.Shift(3.0, 0.02))
    with NoBlockingCopies():
        assert denoising.sample_timesteps(denoising.FlowPath(), 0, 0, ids, 30, 980, sampling).shape == (3,)


def test_micro_batches_of_an_inverted_window_are_cut_without_waiting(parts):
    step = parts.step("dpo")
    step._window = {index: place for place, index in enumerate(INDICES)}, step.prepare(INDICES, 0)
    with NoBlockingCopies():
        cut = step.prepare([4, 3], 0)
    assert len(cut.problem.xt) == 4


def test_the_device_cannot_be_read():
    with pytest.raises(RuntimeError):
        torch.ones(1, device=DEVICE).item()
    with pytest.raises(AssertionError, match="host waits"), NoBlockingCopies():
        torch.ones(2).to(DEVICE)
    with pytest.raises(AssertionError, match="copies to the device"):
        torch.tensor([1.0], device=DEVICE)
