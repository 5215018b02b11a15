"""A regression that trains in milliseconds, for everything the trainer promises whatever it trains.

`python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.training.toy DIRECTORY` runs it on two ranks,
of which one is told to stop at step 3; it then goes on.
"""

import io
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from diffalign.data import PairSampler
from diffalign.interrupts import Interrupted
from diffalign.training import metrics, zero
from diffalign.training.batching import BatchPlan
from diffalign.training.settings import LoggingSettings, OptimizerSettings, TrainSettings
from diffalign.training.trainer import Trainer

EXAMPLES = 20
# adam_epsilon is large so that the size of the gradient matters, not only its direction: Adam would hide a wrong scale.
OPTIMIZER = {"learning_rate": 0.2, "lr_scheduler": "constant", "adam_epsilon": 1.0, "max_grad_norm": 1e6}


def forget_accelerator() -> None:
    """Reset what accelerate keeps between two Accelerators of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def policy() -> nn.Module:
    """Return the same small network every time; its first layer is frozen."""
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    network[0].requires_grad_(False)
    return network


def loss(network: nn.Module, indices: list[int], step: int):
    """Return squared errors [B] against fixed targets, disturbed by noise that depends on example and step alone."""
    drawn = [torch.Generator().manual_seed(1000 * step + index) for index in indices]
    inputs = torch.stack([torch.sin(torch.arange(6.0) * (index + 1)) for index in indices])
    targets = torch.stack([torch.cos(torch.arange(3.0) * (index + 1)) for index in indices])
    noise = torch.stack([torch.randn(3, generator=generator) for generator in drawn])
    errors = (network(inputs) - targets - 0.1 * noise).square().mean(dim=1)
    return errors, {"loss": errors.detach()}


def trainer(
    directory: Path,
    *,
    micro: int = 2,
    accumulate: int = 2,
    loss=loss,
    identity=None,
    on_step=None,
    logging_steps: int = 1,
    **settings,
):
    """Build a trainer of the toy; `settings` go to the sections they belong to."""
    optimizer = {**OPTIMIZER, **{k: v for k, v in settings.items() if k in OptimizerSettings.model_fields}}
    train = {k: v for k, v in settings.items() if k in TrainSettings.model_fields}
    assert settings.keys() <= optimizer.keys() | train.keys()
    forget_accelerator()
    with zero.as_ddp():
        accelerator = Accelerator(cpu=True)
    plan = BatchPlan(micro, accumulate, accelerator.num_processes)
    return Trainer(
        accelerator=accelerator,
        policy=policy(),
        loss=loss,
        sampler=PairSampler(EXAMPLES, seed=0),
        plan=plan,
        train=TrainSettings(output_dir=str(directory), **{"max_train_steps": 6, **train}),
        optimizer=OptimizerSettings(**optimizer),
        logging=LoggingSettings(logging_steps=logging_steps, report_to=[]),
        identity=identity or {},
        on_step=on_step,
        console=Console(file=io.StringIO()),
    )


def weights(network: nn.Module) -> torch.Tensor:
    """Return the trained parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in network.parameters() if p.requires_grad])


def saved(folder: Path) -> torch.Tensor:
    """Return the trained parameters of a checkpoint as one vector, in the order of the network."""
    tensors = load_file(folder / "trainable.safetensors")
    return torch.cat([tensors[name].flatten() for name, p in policy().named_parameters() if p.requires_grad])


def trajectory(directory: Path) -> list[dict[str, float]]:
    """Return the logged lines without what depends on the machine."""
    lines = metrics.read(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("pairs_per_second", "peak_memory_gib")} for line in lines]


def told_to_stop(during: int, number: int = signal.SIGTERM, rank: int = 0):
    """Return the loss of the toy, which sends `rank` a signal while optimizer step `during` (from 0) is computed."""

    def signalling(network: nn.Module, indices: list[int], step: int):
        if step == during and PartialState().process_index == rank:
            signal.raise_signal(number)
        return loss(network, indices, step)

    return signalling


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with suppress(Interrupted):
        trainer(folder, micro=2, accumulate=1, loss=told_to_stop(2, rank=1), logging_steps=2).fit()
    trainer(folder, micro=2, accumulate=1, resume_from_checkpoint="latest", logging_steps=2).fit()
