"""Whether the micro-steps of a run are replayed as CUDA graphs, and why not."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn

from diffalign.backbones.families import kind_of
from diffalign.config import Config
from diffalign.training.static_step import CudaGraphs, Recorder, StaticStep


def static_step(
    config: Config, step: Any, denoiser: nn.Module, accelerator: Accelerator, console: Console
) -> StaticStep | None:
    """Return what replays the micro-steps of `step`; None if nobody asked, or if that is impossible, which is said.

    step: the loss function of the run, a PreferenceStep unless the objective is online.
    """
    if config.performance.cuda_graphs != "step":
        return None
    graphs = recorder()
    why = "there is no GPU" if graphs is None else next(_obstacles(config, denoiser, accelerator), None)
    if graphs is None or why is not None:
        console.print(f'performance.cuda_graphs "step" is ignored: {why}.')
        return None
    return StaticStep(step.prepare, step.evaluate, accelerator.backward, graphs)


def recorder() -> Recorder | None:
    """Return what records on this machine, if anything does."""
    return CudaGraphs() if torch.cuda.is_available() else None


def _obstacles(config: Config, denoiser: nn.Module, accelerator: Accelerator) -> Iterator[str]:
    """Yield what in a run no graph can hold, in words."""
    if config.is_online:
        yield f'the passes of a rollout depend on what "{config.objective_name}" draws'
    if config.loss.auto_beta is not None:
        yield "loss.auto_beta gives every step another beta, and a graph holds numbers"
    if kind_of(denoiser).cuts_text or config.data.long_prompts == "chunk":
        yield "prompts of unequal lengths are cut on the host"
    if getattr(denoiser, "is_gradient_checkpointing", False):
        yield "recomputing activations (train.gradient_checkpointing) saves the state of random numbers on the host"
    if config.model.quantization != "none":
        yield "nobody has tried whether a graph can hold how a quantised weight becomes dense"
    if accelerator.distributed_type != DistributedType.NO:
        yield "several processes exchange gradients from the host"
    if accelerator.scaler is not None:
        yield "the loss scale of train.mixed_precision fp16 changes on the host"
