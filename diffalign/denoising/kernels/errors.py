"""Errors of predictions, and their gradient, in one pass each."""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.denoising.kernels.choice import triton_for


def squared_errors(pred: Tensor, target: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the mean over C, H, W of (pred - target)^2, and the same of a reference: [N], [N] or None, float32.

    Kept for the gradient are the prediction, in the dtype it has, and the target: no difference and no float32 copy.

        d error / d pred = 2 / (C * H * W) * (pred - target),    rounded once, to the prediction's dtype

    Both errors are summed in one order: equal predictions have equal errors, bit for bit, whatever their memory layout.
    On a GPU that order depends on C, H and W alone. float64 in, float64 out. There is no second derivative.

    Args:
        pred: [N,...], any floating dtype and layout, with or without gradient.
        target: [N,...], without gradient.
        reference: [N,...], without gradient.
    """
    assert pred.shape == target.shape, f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ"
    if reference is not None:
        assert reference.shape == pred.shape, f"reference {tuple(reference.shape)}, prediction {tuple(pred.shape)}"
    constants = (target,) if reference is None else (target, reference)
    assert not any(tensor.requires_grad for tensor in constants), "no gradient flows to a target or a reference"
    return _SquaredErrors.apply(pred, target, reference)


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred: Tensor, target: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(pred, target)
        ctx.set_materialize_grads(False)  # no launch for zeros of the reference, which has no gradient
        triton = _triton_for(pred, target)
        if triton is not None:
            of_pred, of_reference = triton.squared_errors(pred, target, reference)
        else:
            of_pred = _mean_square(pred, target)
            of_reference = None if reference is None else _mean_square(reference, target)
        if of_reference is not None:
            ctx.mark_non_differentiable(of_reference)
        return of_pred, of_reference

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:  # nobody asks
            return None, None, None
        pred, target = ctx.saved_tensors
        triton = _triton_for(pred, target)
        if triton is not None:
            return triton.squared_errors_backward(pred, target, grad), None, None
        slope = grad * (2 / max(pred[:1].numel(), 1))
        difference = _difference(pred, target).mul_(slope.view(-1, *(1 for _ in pred.shape[1:])))
        return difference.to(pred.dtype), None, None


def _triton_for(pred: Tensor, target: Tensor) -> ModuleType | None:
    """Return the Triton kernels if they run here and the errors are float32: they know nothing wider."""
    module = triton_for(pred)
    return module if module is not None and _wide(pred, target) == torch.float32 else None


def _wide(pred: Tensor, target: Tensor) -> torch.dtype:
    """Return the dtype errors are computed in.

    In bfloat16 the squares alone would move a DPO logit at beta 5000 by 0.5.
    """
    return torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    """Return pred - target in the wide dtype; only the target is cast, the subtraction widens the prediction."""
    return torch.sub(pred, target.to(_wide(pred, target)))


def _mean_square(pred: Tensor, target: Tensor) -> Tensor:
    return _difference(pred, target).square_().flatten(1).mean(1)
