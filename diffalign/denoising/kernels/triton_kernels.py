"""The Triton versions of the kernels. Only `choice` imports this module: it needs the optional package `triton`.

A latent is read at its strides, so a channels-last prediction is not copied. `enable_fp_fusion` is off: with it
a * b + c would be rounded once here and twice in torch.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements a program, or counters of a draw
_SUM_BLOCK = 4096  # elements a program adds up at a time; with C, H, W it fixes the order of summation
_WORDS = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(2 * math.pi / 2**32)


# Draws


def philox_words(key: tuple[int, int], step: int, example_ids: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """Return four words [B,blocks], int64 of 32 bits, for every example: what `draws.philox4x32` gives."""
    rows, device = len(example_ids), example_ids.device
    words = torch.empty(4, rows, blocks, dtype=torch.int64, device=device)
    arguments = example_ids.contiguous(), words, *key, step, words.stride(0), blocks
    _launch(_words_kernel, rows, blocks, device, *arguments)
    return tuple(words.unbind(0))


def normal(key: tuple[int, int], step: int, example_ids: Tensor, count: int) -> Tensor:
    """Return `count` standard normal numbers for every example: [B,count] float32."""
    rows, device = len(example_ids), example_ids.device
    values = torch.empty(rows, count, dtype=torch.float32, device=device)
    arguments = example_ids.contiguous(), values, *key, step, count
    _launch(_normal_kernel, rows, triton.cdiv(count, 4), device, *arguments)
    return values


@triton.jit
def _philox(ids, row, seed, stream, step, block):
    """Return the words of some counters (block, step, low word of the id, high word) under the key (seed, stream)."""
    example = tl.load(ids + row)
    low, high = (example & 0xFFFFFFFF).to(tl.uint32), ((example >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(block).to(tl.uint32)
    key = seed.to(tl.uint64) | (stream.to(tl.uint64) << 32)
    return tl.philox(key, block.to(tl.uint32), zero + step.to(tl.uint32), zero + low, zero + high)


@triton.jit(do_not_specialize=["seed", "stream", "step"])
def _words_kernel(ids, words, seed, stream, step, word_stride, blocks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = _philox(ids, row, seed, stream, step, block)
    place, mask = words + row * blocks + block, block < blocks
    tl.store(place, a.to(tl.int64), mask)
    tl.store(place + word_stride, b.to(tl.int64), mask)
    tl.store(place + 2 * word_stride, c.to(tl.int64), mask)
    tl.store(place + 3 * word_stride, d.to(tl.int64), mask)


@triton.jit
def _box_muller(radial, angular):
    """Turn random words into two independent standard normal numbers; +1: the logarithm of (0, 1], never of 0."""
    radius = tl.sqrt(tl.log((radial.to(tl.float64) + 1) * _WORDS) * -2)
    angle = angular.to(tl.float64) * _TURN
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "stream", "step"])
def _normal_kernel(ids, values, seed, stream, step, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = _philox(ids, row, seed, stream, step, block)
    first, second = _box_muller(a, b)
    third, fourth = _box_muller(c, d)
    index = 4 * block
    place = values + row * count + index
    tl.store(place, first, index < count)
    tl.store(place + 1, second, index + 1 < count)
    tl.store(place + 2, third, index + 2 < count)
    tl.store(place + 3, fourth, index + 3 < count)


# Noising


def noise_and_target(
    x0: Tensor,
    noise: Tensor,
    coefficients: tuple[Tensor, Tensor],
    target_weights: tuple[Tensor, Tensor] | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return two mixtures of x0 and noise, [N] weights of each: xt in `dtype` and the target float32.

    Without `target_weights` the target is the noise itself.
    """
    x0, noise = x0.float().contiguous(), noise.float().contiguous()
    xt = torch.empty_like(x0, dtype=dtype)
    mixed = target_weights is not None
    target = torch.empty_like(x0) if mixed else noise
    count = x0[:1].numel()
    arguments = x0, noise, *coefficients, *(target_weights or coefficients), xt, target, count, mixed
    _launch(_noise_kernel, len(x0), count, x0.device, *arguments)
    return xt, target


@triton.jit
def _noise_kernel(
    x0, noise, alpha, sigma, of_x0, of_noise, xt, target, count, MIXED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, place = index < count, row * count + index
    clean, drawn = tl.load(x0 + place, mask), tl.load(noise + place, mask)
    signal, level = tl.load(alpha + row), tl.load(sigma + row)
    tl.store(xt + place, (signal * clean + level * drawn).to(xt.dtype.element_ty), mask)
    if MIXED:
        tl.store(target + place, tl.load(of_noise + row) * drawn + tl.load(of_x0 + row) * clean, mask)


# Errors


def squared_errors(pred: Tensor, target: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the errors [N] float32 of a prediction and of a reference or None; see `errors.squared_errors`.

    One program adds up one image, in blocks: no atomics, and the same order in every batch.
    """
    errors = torch.empty(len(pred), dtype=torch.float32, device=pred.device)
    reference_errors = None if reference is None else torch.empty_like(errors)
    pred, target = _as_images(pred), _as_images(target)
    other = pred if reference is None else _as_images(reference)
    outputs = errors, errors if reference is None else reference_errors
    shape, strides = pred.shape[1:], (pred.stride(), target.stride(), other.stride())
    arguments = pred, target, other, *outputs, tuple(shape), *strides, reference is not None
    _launch(_errors_kernel, len(pred), 1, pred.device, *arguments, block=_SUM_BLOCK)
    return errors, reference_errors


def squared_errors_backward(pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """Return 2 / (C * H * W) * (pred - target) * grad [N,...] in the dtype and layout of the prediction."""
    images, wanted = _as_images(pred), _as_images(target)
    grad_pred = torch.empty_like(images)
    strides = images.stride(), wanted.stride(), grad_pred.stride()
    arguments = images, wanted, grad.contiguous(), grad_pred, tuple(images.shape[1:]), *strides
    _launch(_backward_kernel, len(images), images[:1].numel(), images.device, *arguments)
    return grad_pred.view_as(pred)


@triton.jit
def _place(row, index, shape, strides):
    """Return where element `index`, counted in the order C, H, W, of an image lies."""
    column, line = index % shape[2], index // shape[2]
    return row * strides[0] + line // shape[1] * strides[1] + line % shape[1] * strides[2] + column * strides[3]


@triton.jit
def _errors_kernel(
    pred,
    target,
    reference,
    errors,
    reference_errors,
    shape,
    pred_strides,
    target_strides,
    reference_strides,
    HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = shape[0] * shape[1] * shape[2]
    total = tl.zeros([BLOCK], dtype=tl.float32)
    reference_total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        wanted = tl.load(target + _place(row, index, shape, target_strides), mask, other=0).to(tl.float32)
        got = tl.load(pred + _place(row, index, shape, pred_strides), mask, other=0).to(tl.float32)
        total += (got - wanted) * (got - wanted)
        if HAS_REFERENCE:
            got = tl.load(reference + _place(row, index, shape, reference_strides), mask, other=0).to(tl.float32)
            reference_total += (got - wanted) * (got - wanted)
    tl.store(errors + row, tl.sum(total, 0) / count)
    if HAS_REFERENCE:
        tl.store(reference_errors + row, tl.sum(reference_total, 0) / count)


@triton.jit
def _backward_kernel(
    pred, target, grad, grad_pred, shape, pred_strides, target_strides, grad_strides, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    count = shape[0] * shape[1] * shape[2]
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    got = tl.load(pred + _place(row, index, shape, pred_strides), mask).to(tl.float32)
    wanted = tl.load(target + _place(row, index, shape, target_strides), mask).to(tl.float32)
    slope = tl.load(grad + row) * (2.0 / count)
    result = ((got - wanted) * slope).to(grad_pred.dtype.element_ty)
    tl.store(grad_pred + _place(row, index, shape, grad_strides), result, mask)


def _as_images(tensor: Tensor) -> Tensor:
    """Return a tensor [N,...] as [N,C,H,W]: four dimensions as they are, others as one row an image."""
    return tensor if tensor.ndim == 4 else tensor.reshape(len(tensor), 1, 1, -1)


def _launch(kernel, rows: int, length: int, device: torch.device, *arguments, block: int = _BLOCK) -> None:
    """Run a kernel with one program for every block of every row."""
    launch(kernel, (rows, triton.cdiv(length, block)), device, *arguments, BLOCK=block)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *arguments, **sizes: int) -> None:
    """Run a kernel with one program for every place of a grid; an empty grid is nothing to do."""
    if all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **sizes, enable_fp_fusion=False)
