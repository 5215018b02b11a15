"""Activations as one function each: bytes kept for the gradient, and their time on this CPU, against plain torch.

`python -m benchmarks.activations [ROUNDS]` prints CPU time of one thread. Both sides take turns in one process; the
ratio is the median over rounds of ratios within a round.
"""

import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.lora_linear import seconds
from diffalign.backbones import adapters, loading, published
from diffalign.backbones.attention import use_backend
from diffalign.backbones.fused_blocks import fuse_activations
from diffalign.backbones.fused_lora import fuse_lora
from diffalign.denoising import kernels

IMAGES, ROUNDS, EPS = 8, 15, 1e-5
TOKENS, MAPS = ((1024, 1280), (1024, 5120)), ((128, 16), (320, 32))  # width of GEGLU; channels and side of a map
Run = Callable[[], Tensor]


def main(rounds: int = ROUNDS) -> None:
    """Print what SDXL would keep, then rows measured on this machine as they come."""
    for checkpointing in (False, True):
        before, after = (sdxl_bytes(fused, checkpointing) / 2**30 for fused in (False, True))
        print(f"SDXL, LoRA r64, pure bfloat16, an image of 1024 pixels, checkpointing {checkpointing}: ", end="")
        print(f"{before:.2f} GiB kept, {after:.2f} with fused activations", flush=True)
    torch.set_num_threads(1)
    print(
        "| what | precision | MiB kept, torch | fused | ms, torch | fused | fused / torch (quartiles) |\n|" + "---|" * 7
    )
    for dtype in (torch.float32, torch.bfloat16):
        for count, width in TOKENS:
            print_row(f"GEGLU [{count},{2 * width}]", dtype, *gates(count, width, dtype), rounds)
        for channels, side in MAPS:
            for layout in (torch.contiguous_format, torch.channels_last):
                name = f"GroupNorm + SiLU [{IMAGES},{channels},{side},{side}], {str(layout).split('.')[1]}"
                print_row(name, dtype, *maps(channels, side, dtype, layout), rounds)
        print_row("embedded SDXL, LoRA r8, 32 images", dtype, *unets(dtype), rounds)


def saved_bytes(run: Run, owned: tuple[Tensor, ...] = ()) -> int:
    """Return the bytes that autograd keeps of a pass, each storage counted once, without those of `owned`."""
    # Not data_ptr(): it is 0 where there are no numbers.
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()  # alive until it is counted, so that no address is used twice
    own = {tensor.untyped_storage()._cdata for tensor in owned}
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def sdxl_bytes(fused: bool, checkpointing: bool) -> int:
    """Count what the published UNet keeps of one image, with tensors that have shapes and no numbers."""
    unet = published.random_unet("sdxl", device="meta")
    adapters.add_lora(unet, 64, alpha=64)
    fuse_lora(unet)
    use_backend(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    if fused:
        fuse_activations(unet, wanted=True)
    with FakeTensorMode():  # on a CPU, where attention has a kernel like a GPU's
        weights = {
            name: nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
            for name, old in unet.named_parameters()
        }
        shapes = (1, 4, 128, 128), (1, 77, 2048), (1, 1280), (1, 6)
        xt, text, pooled, sizes = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        steps, told = torch.empty(1, dtype=torch.int64), {"text_embeds": pooled, "time_ids": sizes}
        inputs = (xt, steps, text), {"added_cond_kwargs": told}
        return saved_bytes(lambda: functional_call(unet, weights, *inputs).sample, tuple(weights.values()))


def gates(count: int, width: int, dtype: torch.dtype) -> tuple[Run, Run]:
    """Return GEGLU of some tokens, plain and fused."""
    projected = torch.randn(count, 2 * width).to(dtype).requires_grad_()

    def plain() -> Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return plain, partial(kernels.geglu, projected)


def maps(channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Run, Run]:
    """Return GroupNorm and SiLU of feature maps, plain and fused; the weights are frozen."""
    x = torch.randn(IMAGES, channels, side, side).to(dtype).to(memory_format=layout).requires_grad_()
    norm = nn.GroupNorm(32, channels, EPS).to(dtype).requires_grad_(False)
    return lambda: F.silu(norm(x)), partial(kernels.group_norm_silu, x, norm.weight, norm.bias, 32, EPS)


def unets(dtype: torch.dtype) -> tuple[Run, Run]:
    """Return passes of the embedded UNet with LoRA, plain and with fused activations."""
    backbone = loading.load("assets/tiny-sdxl", torch_dtype=dtype)
    plain = backbone.denoiser
    adapters.add_lora(plain, 8)
    fuse_lora(plain)
    fused = copy.deepcopy(plain)
    fuse_activations(fused, wanted=True)
    text = backbone.encode_prompts(["a red circle on a blue background"] * 32)
    cond = backbone.condition(text, torch.full((32, 6), 64.0))
    xt, steps = torch.randn(32, backbone.latent_channels, 16, 16), torch.full((32,), 500)
    first, second = (partial(backbone.predict, unet, xt, steps, cond) for unet in (plain, fused))
    return first, second


def print_row(name: str, dtype: torch.dtype, plain: Run, fused: Run, rounds: int) -> None:
    """Measure forward and backward passes in turn and print a row."""
    times = [[seconds(run, backward=True) for run in (plain, fused)] for _ in range(rounds + 1)][1:]
    low, middle, high = statistics.quantiles([after / before for before, after in times], n=4)
    kept = (f"{saved_bytes(run) / 2**20:.2f}" for run in (plain, fused))
    spent = (f"{1000 * statistics.median(column):.2f}" for column in zip(*times, strict=True))
    cells = name, str(dtype).split(".")[1], *kept, *spent, f"{middle:.2f} ({low:.2f} to {high:.2f})"
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
