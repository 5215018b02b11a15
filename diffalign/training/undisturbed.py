"""Training inside a process that does other things too: a notebook, a program that trains twice."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState


@contextmanager
def undisturbed() -> Iterator[None]:
    """Start from what a new process has, and put back what was there, however training ends.

    accelerate keeps the precision of a process's first run in a state that all later ones share, and refuses another;
    `set_seed` seeds the generators of Python, numpy and torch; a configuration decides about TF32. The state of the
    devices and processes themselves (`PartialState`) is left alone: it is the same for every run.
    """
    with ExitStack() as stack:
        for context in (_own_accelerate(), _own_generators(), _own_precision()):
            stack.enter_context(context)
        yield


@contextmanager
def _own_accelerate() -> Iterator[None]:
    kinds = (AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._reset_state()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._reset_state()
            kind._shared_state.update(state)


@contextmanager
def _own_generators() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _own_precision() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
