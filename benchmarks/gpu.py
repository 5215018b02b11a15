"""`python -m benchmarks gpu`: what this GPU can do, what the networks reach of it, and a DPO step option by option.

Every row is written to the result file as soon as it is measured, the most important first: a run that is cut off keeps
what it has. `--tiny` runs all of it on the embedded UNet, on any machine, to see that it works.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_steps
from benchmarks.gpu_script import script_step
from benchmarks.gpu_steps import FLOPS, OPTIONS, REFERENCE_FREE, SIDES, measure, release, settings
from diffalign.denoising import acceleration
from diffalign.jobs.training.networks import checkpoint_activations
from diffalign.jobs.training.train import versions
from diffalign.training.static_step import WARM_UP

Row = dict[str, Any]
PAIRS = {"sdxl": 4, "sd15": 16}
FEW = [("sdxl", 1), ("sd15", 1), ("sd15", 4)]  # pairs a step, where launching may take longer than computing
LAUNCHES = ("all", "compiled as a whole", "CUDA graphs", "CUDA graph of the step",
            "CUDA graph of the step, compiled as a whole")  # fmt: skip
# Sizes that decide: SDXL's products (tokens x in -> out) and attentions (heads, tokens, text).
PRODUCTS = [(8192, 1280, 10240), (8192, 1280, 1280), (8192, 5120, 1280), (8192, 8192, 8192)]
ATTENTIONS = [(20, 1024, 1024), (10, 4096, 4096), (20, 1024, 77)]


def run(file: Path, minutes: float, tiny: bool = False) -> None:
    """Measure section by section until the time is up; write `file` after each row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    record: Row = {"date": datetime.date.today().isoformat(), "device": name, "versions": versions(), "rows": []}
    end = time.monotonic() + 60 * minutes
    for row in rows(device, tiny):
        record["rows"].append(row)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
        print(json.dumps(row), flush=True)
        if time.monotonic() > end:
            record["stopped"] = f"after {minutes} minutes"
            break
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Yield all measurements; one that fails is a row that says why."""
    for section, name, take in sections(device, tiny):
        try:
            yield {"section": section, "name": name, **take()}
        except Exception as error:  # out of memory, no such kernel here, a compiler: the other rows are worth having
            yield {"section": section, "name": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        release()


def sections(device: torch.device, tiny: bool) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """Yield section, name and measurement, the most important first."""
    size = 64 if tiny else 1
    for tokens, inner, outer in PRODUCTS:
        name = f"[{tokens},{inner}->{outer}]"
        yield "product", name, partial(product, device, tokens // size, inner // size, outer // size)
    families = ["sdxl"] if tiny else ["sdxl", "sd15"]
    for family in families:
        for tune in ("lora", "full"):
            pairs = 2 if tiny else PAIRS[family]
            take = partial(baseline, family, tune, pairs, device, tiny)
            yield "step", f"{family} {tune}: script-style", take
            for option in OPTIONS if tune == "lora" else ("all", "eager", "checkpointed"):
                take = partial(step, family, tune, pairs, option, device, tiny)
                yield "step", f"{family} {tune}: {option}", take
    for family, pairs in FEW[:1] if tiny else FEW:
        yield "few pairs", f"{family} x{pairs}: script-style", partial(baseline, family, "lora", pairs, device, tiny)
        for option in LAUNCHES:
            take = partial(step, family, "lora", pairs, option, device, tiny)
            yield "few pairs", f"{family} x{pairs}: {option}", take
    for batch in (1, 2, 4, 8, 16):
        for how in ("eager", "contiguous", "regional", "full", "graphs"):
            yield "frozen pass", f"sdxl x{batch} {how}", partial(frozen_pass, batch, how, device, tiny)
    for kind in ("none", "selective", "full"):
        yield "checkpointing", f"sdxl full {kind}", partial(training_pass, kind, device, tiny)
    for heads, tokens, text in ATTENTIONS:
        for kernel in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION,
                       SDPBackend.CUDNN_ATTENTION):  # fmt: skip
            shape = (max(heads // size, 1), tokens // size, max(text // size, 1))
            yield "attention", f"{heads}x{tokens}x{text} {kernel.name}", partial(attention, *shape, kernel, device)
    for layout in ("contiguous", "channels_last"):
        yield "convolution", f"320x128x128 {layout}", partial(convolution, layout, device, 320 // size)
    yield "optimizer", "AdamW fused, 2.57 B parameters", partial(adamw, 2_567_463_684 // size**3, device)


def step(family: str, tune: str, pairs: int, option: str, device: torch.device, tiny: bool) -> Row:
    """Time an optimizer step with the options of FAST, one of them changed."""
    config = settings(family, tune, pairs, OPTIONS[option])
    warm_up = WARM_UP + 1 if config.performance.cuda_graphs == "step" else 2  # the first of a shape, and its capture
    found = measure(gpu_steps.our_step(config, family, device, tiny), device, warm_up=warm_up)
    flops = (FLOPS if config.objective_name == "dpo" else REFERENCE_FREE)[family][tune]
    counted = not tiny and len(config.lora.blocks) == 3  # fewer adapted blocks are fewer operations than FLOPS says
    return _per_pair(found, pairs, flops if counted else None)


def baseline(family: str, tune: str, pairs: int, device: torch.device, tiny: bool) -> Row:
    """Time what the public scripts do: autocast, checkpointing, eager, the VAE in float32 at every step.

    They take one pair at a time and accumulate; as many as our step has, so that both move the weights as often.
    """
    side = 64 if tiny else SIDES[family]
    found = measure(script_step(family, tune, side, pairs, device, tiny), device)
    return _per_pair(found, pairs, None if tiny else FLOPS[family][tune])


def _per_pair(found: Row, pairs: int, teraflop: float | None) -> Row:
    row = found | {"pairs": pairs, "ms_per_pair": round(found["ms"] / pairs, 2)}
    return row if teraflop is None else row | {"tflops": round(1000 * teraflop * pairs / found["ms"], 1)}


def frozen_pass(batch: int, how: str, device: torch.device, tiny: bool) -> Row:
    """Time a pass of SDXL without gradient."""
    unet = _unet(device, torch.bfloat16, tiny).eval().requires_grad_(False)
    acceleration.channels_last(unet, how != "contiguous")
    compiled = {"regional": "regional", "full": "full", "graphs": "full"}.get(how, "none")
    acceleration.compile_network(unet, compiled, cuda_graphs=how == "graphs")
    inputs = _inputs(unet, batch, device, torch.bfloat16, tiny)

    def take() -> None:
        with torch.no_grad():
            unet(**inputs)

    found = measure(take, device, rounds=10)
    return found | {"ms_per_image": round(found["ms"] / batch, 2)}


def training_pass(kind: str, device: torch.device, tiny: bool) -> Row:
    """Time forward and backward of all weights under autocast, with what is recomputed."""
    unet = _unet(device, torch.float32, tiny).train()
    checkpoint_activations(unet, kind)
    inputs = _inputs(unet, 2, device, torch.float32, tiny)

    def take() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = unet(**inputs)[0].float().square().mean()
        loss.backward()
        unet.zero_grad()

    return measure(take, device)


def _unet(device: torch.device, dtype: torch.dtype, tiny: bool) -> torch.nn.Module:
    return gpu_steps.random_backbone("sdxl", dtype, device, tiny).denoiser


def _inputs(unet: torch.nn.Module, batch: int, device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    config, side = unet.config, 8 if tiny else 128
    width = gpu_steps.pooled_width(unet)
    draw = partial(torch.randn, device=device, dtype=dtype)
    added = {"text_embeds": draw(batch, width), "time_ids": torch.full((batch, 6), 8.0 * side, device=device)}
    return {
        "sample": draw(batch, config.in_channels, side, side),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": draw(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def product(device: torch.device, tokens: int, inner: int, outer: int) -> Row:
    """Time a bfloat16 matrix product: the ceiling of all else."""
    a = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
    b = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
    repeats = 20
    found = measure(lambda: [F.linear(a, b) for _ in range(repeats)], device)
    milliseconds = found["ms"] / repeats
    return {"ms": round(milliseconds, 4), "tflops": round(2e-9 * tokens * inner * outer / max(milliseconds, 1e-9), 1)}


def attention(heads: int, tokens: int, text: int, kernel: SDPBackend, device: torch.device) -> Row:
    """Time forward and backward of an attention with head width 64, batch 8."""
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16, requires_grad=True)
    query, key, value = draw(8, heads, tokens, 64), draw(8, heads, text, 64), draw(8, heads, text, 64)

    def take() -> None:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(query, key, value).sum().backward()

    return measure(take, device)


def convolution(layout: str, device: torch.device, channels: int) -> Row:
    """Time forward and backward of a 3x3 convolution at 128x128, batch 8."""
    wanted = getattr(torch, "channels_last" if layout == "channels_last" else "contiguous_format")
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=torch.bfloat16)
    layer.to(memory_format=wanted)
    x = torch.randn(8, channels, 128, 128, device=device, dtype=torch.bfloat16).to(memory_format=wanted)
    return measure(lambda: layer(x).sum().backward(), device)


def adamw(parameters: int, device: torch.device) -> Row:
    """Time a fused AdamW step over float32 weights."""
    weight = torch.zeros(parameters, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    moves = torch.optim.AdamW([weight], fused=True)
    return measure(moves.step, device)
