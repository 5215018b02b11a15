"""What may accompany a training loop: told of every optimizer step, and saved with the checkpoints."""

from typing import Any


class StepHook:
    """Take part in a training run without the loop knowing how. Every method may be left as it is."""

    def before_step(self, indices: list[int], step: int) -> None:
        """Prepare for optimizer step `step`, in which this process sees the examples `indices`."""

    def after_step(self, step: int) -> None:
        """React to weights that have moved; `step` is the one that was taken, counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, {} for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
