"""Triton's kernels: interpreted on the CPU against torch, compiled for a GPU without one, run where there is one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch on Linux only")

ROOT = Path(__file__).parents[2]
CHECKS = "tests/denoising/triton_checks.py"
KERNELS = ROOT / "diffalign/denoising/kernels"


def run_checks(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", CHECKS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]


def test_interpreted_kernels_agree_with_torch():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_on_a_gpu_agree_with_torch():
    run_checks(TRITON_INTERPRET="0")


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return a function that loads a file of kernels, made to compile for a Hopper GPU what it would launch.

    It returns the module and the PTX by kernel.
    """
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    instructions = {}

    def compile_only(kernel, grid, device, *arguments, **sizes):
        built = kernel.warmup(*arguments, **sizes, enable_fp_fusion=False, grid=grid)
        assert built.asm["cubin"]
        instructions[kernel.__name__] = built.asm["ptx"]

    def load(name):
        # A module of its own: what is compiled here must not be found by a launch on the GPU of this machine.
        spec = importlib.util.spec_from_file_location(f"{name}_for_hopper", KERNELS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "launch", compile_only)
        return module, instructions

    return load


def test_draws_compile_for_a_gpu(compiled):
    kernels, instructions = compiled("triton_kernels")
    kernels.philox_words((1, 2**32 - 1), 2**31, torch.arange(3), 1)
    kernels.normal((2**32 - 1, 5), 0, torch.arange(3), 100)
    assert set(instructions) == {"_words_kernel", "_normal_kernel"}


@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (1, 1, 1, 1)])
def test_noising_and_errors_compile_for_a_gpu_and_keep_an_order(shape, compiled):
    kernels, instructions = compiled("triton_kernels")
    pred, target, row = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape), torch.zeros(shape[0])
    kernels.noise_and_target(target, target, (row, row), (row, row), dtype=torch.bfloat16)
    kernels.squared_errors(pred, target, target)
    kernels.squared_errors_backward(pred, target, row)
    assert set(instructions) == {"_noise_kernel", "_errors_kernel", "_backward_kernel"}
    for text in instructions.values():
        assert not re.search(r"^\s*(atom|red|fma)\.", text, re.MULTILINE)
    for name in ("_noise_kernel", "_backward_kernel"):
        assert "cvt.rn.bf16" in instructions[name]  # to the nearest, unlike Triton's interpreter


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)]
)
def test_activations_compile_for_a_gpu_without_atomics(dtype, layout, compiled):
    kernels, instructions = compiled("triton_activations")
    x, weight = torch.zeros(2, 320, 24, 24, dtype=dtype).to(memory_format=layout), torch.zeros(320, dtype=dtype)
    _, mean, rstd = kernels.group_norm_silu(x, weight, weight, 32, 1e-5)
    kernels.group_norm_silu_backward(x, x, weight, weight, mean, rstd, [True, True, True])
    projected = torch.zeros(3, 5, 2560, dtype=dtype)
    kernels.geglu_backward(projected, kernels.geglu(projected))
    assert {name.strip("_").removesuffix("_kernel") for name in instructions} == {
        "moments", "group", "silu", "sums", "slope", "geglu", "geglu_backward"
    }  # fmt: skip
    for name, text in instructions.items():
        assert not re.search(r"^\s*(atom|red)\.", text, re.MULTILINE)
        assert "ld.global.v4.b32" in text or name == "_group_kernel"  # 16 bytes an instruction
