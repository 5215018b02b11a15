"""Fixtures and rules shared by all tests: no network, fixed seeds, GPU tests only where there is a GPU."""

import os

# Before any import that reads it: nothing here may ask the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
import socket
import sys

import pytest
import torch

from diffalign.denoising import FrozenDenoiser
from tests.plugged import forget
from tests.tiny import (
    build_tiny_flux,
    build_tiny_flux2_dev,
    build_tiny_klein,
    build_tiny_lumina2,
    build_tiny_pixart,
    build_tiny_qwen,
    build_tiny_sana,
    build_tiny_sd3,
    build_tiny_sd15,
    build_tiny_sdxl,
    build_tiny_zimage,
)

# Those that `nohup`, or a shell that starts a job in the background, leaves ignored, and what they do otherwise.
SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


@pytest.fixture
def listening():
    """Let signals reach the test, however the test run was started."""
    before = {number: signal.signal(number, handler) for number, handler in SIGNALS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    """Skip GPU tests on machines without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Let sockets reach this machine only (gloo needs that); a test that asks the hub fails at once."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in LOCAL and host != socket.gethostname():
            raise RuntimeError(f"A test tried to reach {host}. Tests run without a network.")
        return connect(self, address)

    socket.socket.connect = connect_locally
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Return the folder of a random-weight SDXL pipeline; treat it as read-only."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory):
    """Return the folder of a random-weight SD1.5 pipeline; treat it as read-only."""
    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny-sd15")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """Return the folder of a random-weight SD3.5-medium pipeline with T5; treat it as read-only."""
    return build_tiny_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Return the folder of a random-weight FLUX.1-dev pipeline; treat it as read-only."""
    return build_tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_flux2_dev(tmp_path_factory):
    """Return the folder of a random-weight FLUX.2-dev pipeline; treat it as read-only."""
    return build_tiny_flux2_dev(tmp_path_factory.mktemp("models") / "tiny-flux2-dev")


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory):
    """Return the folder of a random-weight FLUX.2-klein pipeline; treat it as read-only."""
    return build_tiny_klein(tmp_path_factory.mktemp("models") / "tiny-klein")


@pytest.fixture(scope="session")
def tiny_pixart_alpha(tmp_path_factory):
    """Return the folder of a random-weight PixArt-alpha pipeline that is told sizes; treat it as read-only."""
    return build_tiny_pixart(tmp_path_factory.mktemp("models") / "tiny-pixart-alpha", "alpha")


@pytest.fixture(scope="session")
def tiny_pixart_sigma(tmp_path_factory):
    """Return the folder of a random-weight PixArt-Sigma pipeline; treat it as read-only."""
    return build_tiny_pixart(tmp_path_factory.mktemp("models") / "tiny-pixart-sigma", "sigma")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """Return the folder of a random-weight Qwen-Image pipeline; treat it as read-only."""
    return build_tiny_qwen(tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture(scope="session")
def tiny_lumina2(tmp_path_factory):
    """Return the folder of a random-weight Lumina-Image 2.0 pipeline; treat it as read-only."""
    return build_tiny_lumina2(tmp_path_factory.mktemp("models") / "tiny-lumina2")


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory):
    """Return the folder of a random-weight SANA pipeline; treat it as read-only."""
    return build_tiny_sana(tmp_path_factory.mktemp("models") / "tiny-sana")


@pytest.fixture(scope="session")
def tiny_zimage(tmp_path_factory):
    """Return the folder of a random-weight Z-Image pipeline; treat it as read-only."""
    return build_tiny_zimage(tmp_path_factory.mktemp("models") / "tiny-zimage")


@pytest.fixture
def diffalign(monkeypatch, capsys):
    """Return a function that runs a command and returns its exit code and what it said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffalign", *map(str, arguments)])
        from diffalign.cli import main

        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stopped.value.code or 0, " ".join((captured.out + captured.err).split())

    return run


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Return the current folder, empty, where plug-ins may be written; what is loaded from it is forgotten."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    forget(folder)


@pytest.fixture
def evaluated(monkeypatch):
    """Return a list to which every pass of the reference adds how many images it sees."""
    seen, evaluate = [], FrozenDenoiser.__call__

    def counting(self, xt, timesteps, cond):
        seen.append(len(xt))
        return evaluate(self, xt, timesteps, cond)

    monkeypatch.setattr(FrozenDenoiser, "__call__", counting)
    return seen
