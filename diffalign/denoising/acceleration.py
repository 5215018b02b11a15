"""Run a network faster without changing what it computes: compiled, channels-last, captured as CUDA graphs.

A network is changed in place and keeps its parameters' names, so optimizers, checkpoints and adapter switches see what
they saw before. Compilation happens at the first call; adapters on and off, with and without gradient, are graphs of
their own.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from diffalign.errors import ConfigError

COMPILER_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)
GRAPHS = 64  # a step needs up to eight: adapters on and off, training and not, and the sizes of partial batches


@dataclass(eq=False)
class Compiled:
    """Call the compiled form of a function; once the compiler has failed, call the function itself.

    `shared` is common to the parts of a network, so that one failure switches all of them and warns once.
    """

    eager: Callable[..., Any]
    shared: "CompilerState"
    compiled: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.eager, fullgraph=True, mode=self.shared.mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        if self.shared.failed:
            return self.eager(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except COMPILER_ERRORS as error:
            self.shared.give_up(error)
            return self.eager(*args, **kwargs)


@dataclass(eq=False)
class CompilerState:
    """Remember whether the compiler has failed on any part of a network."""

    mode: str | None = None
    failed: bool = False

    def give_up(self, error: Exception) -> None:
        """Warn, and run eagerly from now on."""
        self.failed = True
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or ["no reason given"])[0][:200]
        warnings.warn(
            f"torch.compile failed ({type(cause).__name__}: {reason}). Going on without it; set performance.compile: "
            "none to skip the attempt.",
            stacklevel=3,
        )


def compile_network(
    network: nn.Module, how: Literal["none", "regional", "full"], cuda_graphs: bool = False
) -> CompilerState | None:
    """Compile a network in place, as a whole or its repeated transformer blocks; None if there is nothing to do.

    cuda_graphs: capture every static shape (needs "full" and a GPU).
    """
    if how == "none":
        return None
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # A backward pass that cannot be compiled must fail in the forward pass, while there is still an eager way out.
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        torch._functorch.config.force_non_lazy_backward_lowering = True
    graphs = cuda_graphs and how == "full" and torch.cuda.is_available()
    state = CompilerState("reduce-overhead" if graphs else None)
    for part in [network] if how == "full" else repeated_blocks(network):
        # Not nn.Module.compile(): accelerate wraps `forward` in autocast later, and that must stay outside the graph.
        part.forward = Compiled(part.forward, state)
    if graphs:
        # A replay writes its gradients where the last one did, and the first micro-batch's would become `.grad` itself.
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.clone)
    return state


def repeated_blocks(network: nn.Module) -> Iterable[nn.Module]:
    """Return the blocks that diffusers names as worth compiling alone (`_repeated_blocks`)."""
    unnamed = ["BasicTransformerBlock", "JointTransformerBlock", "SanaTransformerBlock", "Lumina2TransformerBlock"]
    names = getattr(network, "_repeated_blocks", None) or unnamed
    return [part for part in network.modules() if type(part).__name__ in names]


def channels_last(network: nn.Module, wanted: bool | None) -> None:
    """Store convolution weights channels-last; None: if the network is on a GPU."""
    on_gpu = next(network.parameters()).is_cuda
    if on_gpu if wanted is None else wanted:
        network.to(memory_format=torch.channels_last)


def to_float8(network: nn.Module) -> None:
    """Replace the linear layers of a frozen network by float8 ones, activations scaled row by row (torchao).

    Convolutions stay as they are: torchao's float8 convolution needs a newer GPU than Hopper. Compile the network, or
    this is slower than bfloat16.

    Raises:
        ConfigError: no GPU with float8, or no torchao.
    """
    require_float8()
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(network, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), _wide_linear)


def require_float8() -> None:
    """Raise ConfigError where `to_float8` cannot work."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            'performance.reference_dtype "fp8" needs a GPU with float8 (compute capability 8.9, Hopper or later); this '
            "machine has none. Use bf16 or policy."
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError('performance.reference_dtype "fp8" needs torchao: pip install "diffalign[gpu]", or use bf16.')


def _wide_linear(module: nn.Module, name: str) -> bool:
    """Tell whether a layer is large enough that float8 pays (rows of 1024 or more; measured by others: 1.2x at 2k)."""
    return isinstance(module, nn.Linear) and min(module.in_features, module.out_features) >= 1024
