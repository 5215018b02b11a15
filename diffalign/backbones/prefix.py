"""The encoder of a UNet, computed once for policy and reference where adapters sit behind it only.

With LoRA in the middle and the up blocks alone, the down blocks are the same function of the same input in both passes:
32 % of SDXL's forward pass. The reference's results are kept and handed to the policy, which needs no gradient there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(eq=False)
class SharedPrefix:
    """Record what the down blocks of a UNet return in one pass and return it in the next.

    The caller vouches that both passes have the same inputs: see `denoising.denoising_step`.
    """

    denoiser: nn.Module
    _results: list[Any] = field(default_factory=list)
    _mode: str = "off"

    def __post_init__(self) -> None:
        for place, block in enumerate(self.denoiser.down_blocks):
            block.forward = self._wrapped(place, block.forward)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the results of the pass within."""
        self._results = []
        with self._switched("record"):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the pass within the results that were kept, then forget them."""
        with self._switched("replay"):
            yield
        self._results = []

    @contextmanager
    def _switched(self, mode: str) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "off"

    def _wrapped(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._mode == "replay":
                return self._results[place]
            result = forward(*args, **kwargs)
            if self._mode == "record":
                self._results.append(result)
            return result

        return run
