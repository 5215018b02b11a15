"""A frozen base in few bits, for LoRA runs on small cards (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The weights of linear layers are kept in 8 or 4 bits and made dense for one product at a time:

y = x dense(W)^T + b        dense(W)_ij = scale q_ij, a scale a row (int8, fp8) or a block of 64 numbers (nf4)

Activations are not quantised, so no image depends on what else is in its batch. What is not linear (convolutions,
norms, tables of positions) stays as it was loaded. Which layers become what is diffusers' choice, and the formats are
those of its TorchAoConfig (Int8WeightOnlyConfig, Float8WeightOnlyConfig) and BitsAndBytesConfig (nf4 with double
quantisation); but weights are converted after loading, one layer at a time on the device. So all that can be loaded can
be quantised, without a GPU too, where diffusers' own loading of nf4 refuses, and a card holds one dense layer at most.
The layers' own backward pass makes weights dense once more: torchao's int8 product keeps a dense copy of every layer.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from diffalign.errors import ConfigError
from diffalign.vocabulary import QUANTIZATIONS

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
BLOCK = 64  # weights that share a scale in nf4
BLOCK_OF_SCALES = 256  # whose 8-bit scales share a float32 one
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes of a layer's code books and the mean of its scales


class QuantizedLinear(nn.Linear):
    """Multiply by a frozen weight that is kept in few bits and made dense where it is used."""

    compute_dtype: torch.dtype  # of the products; diffusers asks for it under this name

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out,in] in `dtype`."""
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            return self.weight.dequantize().to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, state).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [...,out] for x [...,in]."""
        return _FrozenProduct.apply(self, product_dtype(self, x), x)


class _FrozenProduct(torch.autograd.Function):
    """The function of the module's docstring: layer, dtype, x -> y. It keeps nothing but the layer itself."""

    @staticmethod
    def forward(ctx: Any, layer: QuantizedLinear, dtype: torch.dtype, x: Tensor) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), layer.dense(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, (grad @ ctx.layer.dense(grad.dtype)).to(ctx.x_dtype)


def quantize(denoiser: nn.Module, kind: str, device: torch.device | str) -> int:
    """Quantise the linear layers of `denoiser` in place, each on `device`, and return how many there are.

    The parameters freeze, and the layers stay where they were quantised. Both networks of a LoRA run are this one, with
    adapters and without, so that policy and reference start from the same bits.

    Raises:
        ConfigError: the package that does it is missing.
    """
    require(kind)
    layers = list(linear_layers(denoiser))
    for _, layer in layers:
        _convert(layer.requires_grad_(False), kind, torch.device(device))
    return len(layers)


def keep_from_ddp(denoiser: nn.Module) -> None:
    """Let DDP leave the quantised weights of `denoiser`, with all adapters it will have, as every process made them.

    They are the same everywhere, and torchao's are no tensors that can be sent.
    """
    names = [f"{name}.weight" for name, part in denoiser.named_modules() if isinstance(part, QuantizedLinear)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, names)


def require(kind: str) -> None:
    """Refuse a quantisation whose package is not installed.

    Raises:
        ConfigError: that, with how to install it.
    """
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        others = [other for other in QUANTIZATIONS if other != "none" and PACKAGES[other] != PACKAGES[kind]]
        raise ConfigError(
            f'model.quantization "{kind}" needs {PACKAGES[kind]}: pip install "diffalign[quant]", or use none'
            f" ({', '.join(others)} would need {PACKAGES[others[0]]})."
        )


def linear_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield by name the layers of a denoiser that `quantize` converts: adapters and what must stay float32 are none."""
    kept = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    for name, module in denoiser.named_modules():
        parts = set(name.split("."))
        if isinstance(module, nn.Linear) and parts.isdisjoint(kept) and parts.isdisjoint({"lora_A", "lora_B"}):
            yield name, module


def stored_bytes(layer: nn.Linear, kind: str) -> int:
    """Return how many bytes the quantised weight of a layer takes, scales and tables included."""
    numbers = layer.in_features * layer.out_features
    if kind != "nf4":
        return numbers + (5 if kind == "int8" else 4) * layer.out_features  # float32 scales; int8: and zero points
    blocks = -(-numbers // BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + NF4_TABLES


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the precision that a network computes in: that of its first parameter, before it was quantised."""
    first = next(network.parameters())
    state = getattr(first, "quant_state", None)  # of nf4, whose parameters are bytes
    return first.dtype if state is None else state.dtype


def product_dtype(layer: nn.Linear, x: Tensor) -> torch.dtype:
    """Return the precision in which a frozen layer multiplies x."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return layer.compute_dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype


def _convert(layer: nn.Linear, kind: str, device: torch.device) -> None:
    layer.compute_dtype = layer.weight.dtype
    if kind == "nf4":
        from bitsandbytes.nn import Params4bit

        weight = Params4bit(layer.weight.data, requires_grad=False, blocksize=BLOCK, quant_type="nf4")
        layer.weight = weight.to(device)  # which quantises
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        quantize_(layer.to(device), Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    layer.__class__ = QuantizedLinear
