"""Which attention kernel is right and fastest here: each is run on the network's shapes and compared with the math.

cuDNN's and flash attention have failed, crashed or been slower in some versions and shapes (lengths that are no
multiple of 128, for one), so a choice by name or by version is a guess.
"""

import logging
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.backbones.attention import backend
from diffalign.errors import ModelError

logger = logging.getLogger(__name__)
CANDIDATES = ("cudnn", "flash", "efficient")
# Of the norm of the difference to float32 math, over the norm of that; forward and gradients.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ROUNDS = 5


@dataclass(frozen=True, order=True)
class AttentionShape:
    """Hold the size of one attention: `queries` tokens see `keys` tokens with `heads` heads of `dim` channels."""

    heads: int
    queries: int
    keys: int
    dim: int


def attention_shapes(denoiser: nn.Module, height: int, width: int, text_tokens: int = 77) -> list[AttentionShape]:
    """Return the distinct attentions of a UNet on latents of `height` x `width`, sorted."""
    shapes = set()
    for name, attn in denoiser.named_modules():
        if isinstance(attn, Attention):
            level = _level(name, len(denoiser.down_blocks))
            tokens = -(-height // 2**level) * -(-width // 2**level)
            keys = text_tokens if name.endswith("attn2") else tokens
            shapes.add(AttentionShape(attn.heads, tokens, keys, attn.inner_dim // attn.heads))
    return sorted(shapes)


def probe(device: torch.device | str, dtype: torch.dtype, shapes: Sequence[AttentionShape], images: int = 2) -> str:
    """Return the fastest kernel that is right on all `shapes`, forward and backward; "default" on a CPU.

    One warning names the kernels that failed and why. Where none passes the choice is "default", torch's own.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "default"
    return fastest(CANDIDATES, device, dtype, shapes, images)


def fastest(
    names: Iterable[str], device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape], images: int = 2
) -> str:
    """Return which of the kernels `names` is right on all `shapes` and takes the least time, or "default"."""
    seconds, failures = {}, []
    for name in names:
        try:
            seconds[name] = sum(_checked_seconds(name, device, dtype, shape, images) for shape in shapes)
        except (RuntimeError, ModelError) as error:
            failures.append(f"{name}: {str(error).splitlines()[0]}")
    chosen = min(seconds, key=seconds.get, default="default")
    if failures:
        logger.warning("Attention runs as %s; not usable here: %s", chosen, "; ".join(failures))
    return chosen


def _checked_seconds(name: str, device: torch.device, dtype: torch.dtype, shape: AttentionShape, images: int) -> float:
    """Return the median time of a forward and backward pass.

    Raises:
        ModelError: output or gradients differ from float32 math.
        RuntimeError: torch has no such kernel for this device, dtype or shape.
    """
    inputs = _inputs(shape, images, device)
    expected = _passes("math", inputs)
    inputs = [part.detach().to(dtype).requires_grad_() for part in inputs]
    for what, value, right in zip(("output", "dQ", "dK", "dV"), _passes(name, inputs), expected, strict=True):
        error = ((value.float() - right).norm() / right.norm()).item()
        if not error <= TOLERANCE[dtype]:  # NaN is not
            raise ModelError(f"{what} is off by {error:.1e} of its norm at {shape}")
    times = []
    for _ in range(ROUNDS):
        start = _now(device)
        _passes(name, inputs)
        times.append(_now(device) - start)
    return statistics.median(times)


def _inputs(shape: AttentionShape, images: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (shape.queries, shape.keys, shape.keys)
    drawn = [torch.randn(images, shape.heads, length, shape.dim, generator=generator) for length in lengths]
    return [part.to(device).requires_grad_() for part in drawn]


def _passes(name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of its mean square with respect to Q, K and V."""
    with backend(name):
        output = F.scaled_dot_product_attention(*inputs)
        return [output.detach(), *torch.autograd.grad(output.float().square().mean(), list(inputs))]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _level(name: str, levels: int) -> int:
    """Return how often the latents were halved where the module `name` of a UNet works."""
    part, number, *_ = name.split(".")
    if part == "mid_block":
        return levels - 1
    return int(number) if part == "down_blocks" else levels - 1 - int(number)
