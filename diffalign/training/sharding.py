"""Weights that no process holds whole (FSDP2): sharded by torch, as `accelerate launch` asks; here they come and go.

accelerate 1.15 ignores an FSDP setting on the CPU (`AcceleratorState` turns it on for GPUs only), and takes one model
with one optimizer. So the networks are cut with `torch.distributed.fsdp.fully_shard`, the same on CPU and GPU, and what
accelerate does around them stays its own.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffalign.errors import ConfigError
from diffalign.training import zero


def wanted(accelerator: Accelerator) -> bool:
    """Tell whether this run is launched with FSDP; one process holds everything and needs no shards."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1


def is_sharded(module: nn.Module) -> bool:
    """Tell whether every process must take part in a forward pass of `module`."""
    return isinstance(module, FSDPModule)


def check(mixed_precision: str) -> None:
    """Refuse kinds of FSDP that do not work here, before a network is loaded.

    Raises:
        ConfigError: FSDP of version 1, weights offloaded to or loaded by one process's CPU, or fp16.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"FSDP version {version} is not supported. Set fsdp_version: 2 in the accelerate configuration, as "
            "configs/accelerate/fsdp2.yaml does."
        )
    for name in ("OFFLOAD_PARAMS", "CPU_RAM_EFFICIENT_LOADING"):
        if os.environ.get(f"FSDP_{name}", "false").lower() == "true":
            raise ConfigError(f"fsdp_{name.lower()}: true is not supported. Set it to false.")
    if mixed_precision == "fp16":
        raise ConfigError('train.mixed_precision "fp16" does not work with FSDP. Use bf16 or no.')


def shard(module: nn.Module, accelerator: Accelerator, repeated_blocks: Sequence[str]) -> nn.Module:
    """Cut the parameters of `module` over the processes in place, if the launch asks for it; return it.

    A part of one of the classes `repeated_blocks` is whole only while it computes. Weights are gathered in the
    precision of the run, so that no copy cast by autocast outlives the part; gradients are summed in float32.
    """
    if not wanted(accelerator):
        return module
    plugin = FullyShardedDataParallelPlugin()  # reads what accelerate launch left in the environment
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    module.to(memory_format=torch.contiguous_format)  # FSDP takes no channels-last weights
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = named.split(",") if named else repeated_blocks
    for part in list(module.modules()):
        if type(part).__name__ in names:
            fully_shard(part, reshard_after_forward=plugin.reshard_after_forward, **settings)
    return fully_shard(module, **settings)


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer | zero.ZeroOptimizer]:
    """Let accelerate prepare what trains. A sharded network needs its autocast only, ZeRO an engine."""
    if zero.wanted(accelerator):
        return zero.prepare(accelerator, network, optimizer)
    if not is_sharded(network):
        return accelerator.prepare(network, optimizer)
    # Gradients of every micro-batch are summed at once: kept whole until the last one, they would fill the memory.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    return accelerator.prepare_model(network, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)


def whole(tree: Any, keep: bool = True) -> Any:
    """Return a tree of mappings and lists with every sharded tensor whole and on the CPU.

    Every process must call this, in the same order; those with keep=False get None in the place of sharded tensors.
    """
    if isinstance(tree, DTensor | zero.Part):
        full = tree.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    return tree


def cut(value: Any, parameter: Tensor) -> Any:
    """Return this process's part of a whole tensor that belongs to `parameter`; anything else as it is.

    Nothing is sent: every process has read the whole tensor.
    """
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def clip(accelerator: Accelerator, optimizer: Any, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of `max_norm`; return the norm they had, over all processes."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        return optimizer.clip(max_norm)
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return accelerator.clip_grad_norm_(parameters, max_norm)
    # Not accelerate's: to find the network it compares the parameters with those of the reference, tensor by tensor.
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
