"""LoRA layers on this CPU: peft's forward pass against the fused one, in the embedded UNet and at SDXL's sizes.

`python -m benchmarks.lora_linear [ROUNDS]` prints CPU time of one thread. The variants take turns in one process, so a
ratio is the median over rounds of ratios within a round.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffalign import config as configuration
from diffalign.backbones import adapters, loading
from diffalign.backbones.attention import share_text, use_backend
from diffalign.backbones.fused_lora import fuse_lora, project

PAIRS, PASSES = 16, ("forward", "forward + backward")
SIZES = ((1280, 1280, 1024, 1), (640, 640, 4096, 1), (1280, 10240, 1024, 1), (640, 640, 4096, 3))  # the last: q, k, v
Run = Callable[[], Tensor]


def main(rounds: int = 7) -> None:
    """Measure and print the rows of a table as they come."""
    torch.set_num_threads(1)
    print("| what | LoRA | precision | pass | variant | seconds | peft / variant (quartiles) |\n|" + "---|" * 7)
    demo = configuration.load("configs/tiny/dpo.yaml", []).lora
    for rank, targets in ((demo.rank, demo.lora_target_modules), (8, adapters.ATTENTION)):
        for half in (False, True):
            described = f"r{rank}, {'attention' if targets == adapters.ATTENTION else 'linear, conv'}"
            print_rows(("tiny UNet, 32 images", described), half, unets(rank, list(targets), half), rounds)
    for size in SIZES:
        for half in (False, True):
            what = "{3} of {0}->{1}, {2} tokens".format(*size)
            print_rows((what, "r64"), half, layers(*size, half), rounds)


def unets(rank: int, targets: list[str], half: bool) -> dict[str, Run]:
    """Return passes of the embedded UNet on 16 pairs."""
    backbone = loading.load("assets/tiny-sdxl", torch_dtype=torch.bfloat16 if half else torch.float32)
    peft = backbone.denoiser
    adapters.add_lora(peft, rank, target_modules=targets)
    text = backbone.encode_prompts(["a red circle on a blue background"] * 2 * PAIRS)
    cond = backbone.condition(text, torch.full((2 * PAIRS, 6), 64.0))
    xt, timesteps = torch.randn(2 * PAIRS, backbone.latent_channels, 16, 16), torch.full((2 * PAIRS,), 500)
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    grouped = copy.deepcopy(fused)
    use_backend(grouped)
    shared = copy.deepcopy(fused)
    share_text(shared)
    variants = {
        "peft": (peft, cond),
        "fused": (fused, cond),
        "fused, together": (grouped, cond),
        "fused, together, shared text": (shared, cond.shared(2)),
    }
    return {
        name: partial(under, half, partial(backbone.predict, unet, xt, timesteps, told))
        for name, (unet, told) in variants.items()
    }


def layers(inputs: int, outputs: int, tokens: int, count: int, half: bool) -> dict[str, Run]:
    """Return passes of `count` LoRA layers that read the same tokens."""
    peft = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(count)).requires_grad_(False)
    peft.to(torch.bfloat16 if half else torch.float32)
    inject_adapter_in_model(LoraConfig(r=64, lora_alpha=64, target_modules=[str(i) for i in range(count)]), peft)
    for parameter in adapters.trainable_parameters(peft):
        parameter.data = parameter.data.float()
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    x = torch.randn(1, tokens, inputs, requires_grad=True)
    variants = {
        "peft": lambda: torch.stack([layer(x) for layer in peft]),
        "fused": lambda: torch.stack([layer(x) for layer in fused]),
        "fused, together": lambda: torch.stack(project(list(fused), x)),
    }
    return {name: partial(under, half, run) for name, run in variants.items() if count > 1 or "together" not in name}


def under(half: bool, run: Run) -> Tensor:
    """Run under bfloat16 autocast or not."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return run()


def print_rows(what: tuple[str, str], half: bool, variants: Mapping[str, Run], rounds: int) -> None:
    """Measure the variants in turn and print their rows."""
    for name in PASSES:
        times = {variant: [] for variant in variants}
        for _ in range(rounds + 1):
            for variant, run in variants.items():
                times[variant].append(seconds(run, backward=name != "forward"))
        for variant, measured in times.items():
            ratios = [peft / own for peft, own in zip(times["peft"][1:], measured[1:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells = f"{statistics.median(measured[1:]):.4f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"
            row = (*what, "bf16 autocast" if half else "float32", name, variant, *cells)
            print(f"| {' | '.join(row)} |", flush=True)


def seconds(run: Run, backward: bool) -> float:
    """Return the CPU time of a pass."""
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        output = run()
        if backward:
            output.float().mean().backward()
    return time.process_time() - start


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
