"""Whole micro-steps as CUDA graphs: networks, objective and backward pass launched as one, over static tensors.

A captured graph reads and writes the addresses that it saw. So a micro-step has two parts: `prepare`, which draws and
loads and has the host in it, and a recording, into whose tensors the prepared ones are copied. Gradients add up in
`.grad` tensors that stay where they are: the trainer sets them to zero in place.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # eager micro-steps of a shape before its recording: they compile, allocate and choose algorithms
SHAPES = 4  # recordings at most; partial batches and rare shapes run eagerly

Result = tuple[Tensor, dict[str, Tensor]]  # losses [B] and metrics, without gradient


class Recorder:
    """Record functions of tensors that stay where they are. Here, as on a CPU: by keeping the function."""

    def eagerly(self) -> AbstractContextManager[None]:
        """Return a context for what is not replayed."""
        return nullcontext()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the function; the function itself has then not run."""
        return function


class CudaGraphs(Recorder):
    """Record as CUDA graphs, which share one pool of memory: what one leaves there is copied before the next runs."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Run on the stream of the captures: gradients are then created, and workspaces chosen, where they are used."""
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            yield
        present.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture the function. Raises RuntimeError if it waits for the host, or does what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            function()
        return graph.replay


@dataclass(frozen=True)
class Recording:
    """Hold a recorded micro-step of one shape."""

    inputs: Any
    results: list[Result]  # of the last replay, in the first place
    replay: Callable[[], None]

    def __call__(self, inputs: Any) -> Result:
        """Take the step for other inputs of the same shape."""
        for held, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            held.copy_(given)
        self.replay()
        losses, metrics = self.results[0]
        return losses.clone(), {name: values.clone() for name, values in metrics.items()}


class StaticStep:
    """Take micro-steps with their backward pass: each shape eagerly at first, then from its recording.

    The results, and the gradients added, are those of the eager step. What cannot be captured costs one warning, and
    runs eagerly from then on.

    Args:
        prepare: given example indices and the step, returns tensors in nested dataclasses and mappings; never recorded.
        evaluate: given the network and these, returns losses [B] and metrics; a function of tensors only.
        backward: adds the gradient of a scalar to `.grad`.
        recorder: how a step is recorded.
    """

    def __init__(
        self,
        prepare: Callable[[list[int], int], Any],
        evaluate: Callable[[nn.Module, Any], Result],
        backward: Callable[[Tensor], None],
        recorder: Recorder,
    ):
        self.prepare, self.evaluate, self.backward, self.recorder = prepare, evaluate, backward, recorder
        self.shapes = SHAPES
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, Recording] = {}

    def __call__(self, network: nn.Module, indices: list[int], step: int) -> Result:
        """Add the gradient of the mean loss of some examples; return losses [B] and metrics, detached."""
        inputs = self.prepare(indices, step)
        shape = _shape(inputs)
        self._seen[shape] += 1
        if shape not in self._recordings and self._seen[shape] > WARM_UP and len(self._recordings) < self.shapes:
            self._record(shape, network, inputs)
        if shape in self._recordings:
            return self._recordings[shape](inputs)
        with self.recorder.eagerly():
            return self._take(network, inputs)

    def _take(self, network: nn.Module, inputs: Any) -> Result:
        losses, metrics = self.evaluate(network, inputs)
        self.backward(losses.mean())
        return losses.detach(), metrics

    def _record(self, shape: Any, network: nn.Module, inputs: Any) -> None:
        held: Any = _copied(inputs)
        results: list[Result] = []

        def take() -> None:
            results[:] = [self._take(network, held)]

        try:
            self._recordings[shape] = Recording(held, results, self.recorder.record(take))
        except RuntimeError as error:
            self.shapes = 0
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            warnings.warn(
                f"A micro-step could not be captured as a CUDA graph ({reason}). Going on without; set "
                "performance.cuda_graphs: none to skip the attempt.",
                stacklevel=4,
            )


def _parts(tree: Any) -> dict[str, Any] | None:
    """Return what a dataclass or a mapping consists of by name, None of anything else."""
    if is_dataclass(tree):
        return {field.name: getattr(tree, field.name) for field in fields(tree)}
    return dict(tree) if isinstance(tree, Mapping) else None


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested dataclasses and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    for part in (_parts(tree) or {}).values():
        yield from _tensors(part)


def _copied(tree: Any) -> Any:
    """Return a tree with tensors of its own: the given ones may be views of what lives elsewhere."""
    if isinstance(tree, Tensor):
        return tree.clone()
    parts = _parts(tree)
    if parts is None:
        return tree
    copied = {name: _copied(part) for name, part in parts.items()}
    return replace(tree, **copied) if is_dataclass(tree) else copied  # type: ignore[type-var]


def _shape(tree: Any) -> Any:
    """Return what recordings differ in: shapes and types of tensors, and everything else."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    parts = _parts(tree)
    if parts is not None:
        return tuple((name, _shape(part)) for name, part in parts.items())
    return tuple(tree) if isinstance(tree, list) else tree
