"""LoRA layers without peft's detours: linear ones as one autograd function, convolutions in the base's precision.

y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T        i over the layers that read the same x, such as to_q, to_k, to_v

peft keeps the parameters, their files and the switch; only the forward pass is replaced. Where peft copies x to
float32, multiplies by s, adds and casts back, each a pass over memory, here the products accumulate into the output
and the gradients into one dx. Layers that share x read it once for all their A, in the forward and in the backward
pass. A quantised W is made dense for each product. With B = 0 the output is the bits of the frozen layer.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffalign.backbones.quantization import QuantizedLinear, product_dtype

logger = logging.getLogger(__name__)


class FusedLinear(Linear):
    """Run a peft LoRA layer as one autograd function; what that does not cover goes peft's own way.

    Covered: one plain adapter (no DoRA or other variant) without dropout, not merged, on frozen weights. Its parameters
    are read directly: forward hooks on `lora_A`, `lora_B` and the base layer do not run while it acts.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y [...,out] for x [...,in]."""
        if args or kwargs or _acting(self) is None:
            return super().forward(x, *args, **kwargs)
        return _apply([self], x)[0]


class DirectConv2d(Conv2d):
    """Run a peft LoRA convolution in the precision of its base layer, where peft convolves in that of the adapter.

    y = W * x + b + s (B * (A * x)), covered as in FusedLinear. Nothing is fused: autograd differentiates torch's own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y [N,out,h',w'] for x [N,in,h,w]."""
        name = None if args or kwargs else _acting(self)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dtype = self.base_layer, product_dtype(self.base_layer, x)
        a, b = (getattr(self, f"lora_{side}")[name].weight.to(dtype) for side in "AB")
        low = F.conv2d(x.to(dtype), a, None, base.stride, base.padding, base.dilation)
        return torch.add(base(x), F.conv2d(low, b), alpha=self.scaling[name])


def fuse_lora(denoiser: nn.Module) -> int:
    """Let the LoRA layers of `denoiser` run without peft's detours, and return how many do.

    Layers keep their identity, their parameters and their names, so an `adapter_switch` made before still works. What
    stays with peft (weights that train or that others quantised, grouped convolutions, dropout, variants) is counted in
    the log.
    """
    layers = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLinear) or (type(layer) is Linear and type(base) is nn.Linear):
            layer.__class__ = FusedLinear  # not a new module: peft, optimizers and switches hold this one
        elif type(layer) is Conv2d and base.groups == 1 and base.padding_mode == "zeros":
            layer.__class__ = DirectConv2d
    fused = sum(isinstance(layer, FusedLinear | DirectConv2d) and _covered(layer) is not None for layer in layers)
    logger.info("Fused LoRA: %d layers; %d layers keep peft's forward pass.", fused, len(layers) - fused)
    return fused


def project(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers that read the same x, as one function where all are fused and act."""
    if all(isinstance(layer, FusedLinear) and _acting(layer) is not None for layer in layers):
        return _apply(layers, x)
    return tuple(layer(x) for layer in layers)


def _acting(layer: FusedLinear | DirectConv2d) -> str | None:
    """Return the adapter of a layer that is fused and switched on."""
    return None if layer.disable_adapters or layer.merged else _covered(layer)


def _covered(layer: FusedLinear | DirectConv2d) -> str | None:
    """Return the one active adapter of a layer, if the function computes what peft would."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    base, a, b = layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]]
    plain = isinstance(layer.lora_dropout[names[0]], nn.Identity) and a.bias is None and b.bias is None
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return names[0] if plain and not trains else None


def _apply(layers: Sequence[FusedLinear], x: Tensor) -> tuple[Tensor, ...]:
    names = [(layer, _covered(layer)) for layer in layers]
    base = [layer.base_layer for layer in layers]
    a = [layer.lora_A[name].weight for layer, name in names]
    b = [layer.lora_B[name].weight for layer, name in names]
    scales = tuple(layer.scaling[name] for layer, name in names)
    quantized = tuple(part if isinstance(part, QuantizedLinear) else None for part in base)
    w = [part.weight if few is None else None for part, few in zip(base, quantized, strict=True)]
    frozen = [*w, *(part.bias for part in base)]
    return _LowRank.apply(product_dtype(base[0], x), scales, quantized, x, *frozen, *a, *b)


class _LowRank(torch.autograd.Function):
    """The function of the module's docstring for n layers: dtype, scales, layers, x, n W, n biases, n A, n B -> n y.

    W and b are frozen; x, A and B get gradients where they need them. Saved are x, x A^T and A and B in `dtype`, in
    which the products run. Where a layer is given, it is quantised and its W is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        quantized: tuple[QuantizedLinear | None, ...],
        x: Tensor,
        *weights: Tensor | None,
    ) -> Any:
        w, biases, a, b = _quarters(weights)
        ctx.scales, ctx.quantized, ctx.ranks = scales, quantized, [part.shape[0] for part in a]
        ctx.x_like, ctx.master = (x.shape, x.dtype), a[0].dtype
        x, b = x.to(dtype), [part.to(dtype) for part in b]
        a = (a[0] if len(a) == 1 else torch.cat(a)).to(dtype)  # [sum of ranks, in]
        rows = x.reshape(-1, x.shape[-1])
        xa = rows @ a.t()
        add = torch.addmm if _recorded() else Tensor.addmm_  # [M,out] is not copied where that can be avoided
        outputs = []
        for i, low in enumerate(xa.split(ctx.ranks, dim=1)):
            bias = None if biases[i] is None else biases[i].to(dtype)
            y = F.linear(x, _dense(w[i], quantized[i], dtype), bias)  # the frozen layer's
            outputs.append(add(y.view(-1, y.shape[-1]), low, b[i].t(), alpha=scales[i]).view(y.shape))
        ctx.save_for_backward(rows, xa, a, *w, *b)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grads)
        rows, xa, a, *weights = ctx.saved_tensors
        w, b = weights[:count], weights[count:]
        _, _, _, needs_x, *needed = ctx.needs_input_grad
        _, _, needs_a, needs_b = _quarters(needed)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, grad_a, grad_b = None, [None] * count, [None] * count
        if needs_x or any(needs_a):
            low = [_product(grads[i], b[i], ctx.scales[i]) for i in range(count)]
            grad_xa = low[0] if count == 1 else torch.cat(low, dim=1)  # [M, sum of ranks]
        if needs_x:
            grad_x = grad_xa @ a
            for grad, weight, layer in zip(grads, w, ctx.quantized, strict=True):
                grad_x.addmm_(grad, _dense(weight, layer, grad.dtype))
            shape, dtype = ctx.x_like
            grad_x = grad_x.view(shape).to(dtype)
        if any(needs_a):
            grad_a = (grad_xa.t() @ rows).to(ctx.master).split(ctx.ranks)
        for i, low in enumerate(xa.split(ctx.ranks, dim=1)):
            if needs_b[i]:
                grad_b[i] = _product(grads[i].t(), low, ctx.scales[i]).to(ctx.master)
        return None, None, None, grad_x, *[None] * (2 * count), *grad_a, *grad_b


def _dense(weight: Tensor | None, quantized: QuantizedLinear | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if quantized is None else quantized.dense(dtype)


def _recorded() -> bool:
    """Tell whether results are being kept, as selective checkpointing does, so that they must not change any more."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _quarters(parts: Sequence[Any]) -> list[Sequence[Any]]:
    size = len(parts) // 4
    return [parts[i * size : (i + 1) * size] for i in range(4)]


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a b [m,n] in one kernel."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
