"""What several processes share while they train one scorer: nothing but the sums of their gradients and counts.

Every process holds the whole list of pairs and works on its part of each batch; as the weights of a batch follow from
the list alone, summed gradients are those of one process with the whole batch.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def count() -> int:
    """Return how many processes train together; 1 unless torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def own(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of a sequence: every n-th."""
    return items[rank() :: count()]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradients of all processes up, in place; a parameter without one counts as zero."""
    if count() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in trained])
    dist.all_reduce(flat)
    for parameter, summed in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of numbers over all processes."""
    if count() == 1:
        return list(values)
    summed: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def wait() -> None:
    """Return when all processes are here."""
    if count() > 1:
        dist.barrier()
