"""Batch arithmetic: how many pairs make one optimizer step, and which of them a rank takes."""

from dataclasses import dataclass

from diffalign.errors import ConfigError
from diffalign.training.settings import TrainSettings


@dataclass(frozen=True)
class BatchPlan:
    """Split every optimizer step into micro-batches over ranks; all counts are examples: pairs, lists or images."""

    train_batch_size: int  # of one micro-batch on one device
    gradient_accumulation_steps: int
    world_size: int

    @classmethod
    def of(cls, settings: TrainSettings, world_size: int) -> "BatchPlan":
        """Work out the plan of a run.

        Raises:
            ConfigError: global_batch_size is not a multiple of world size x train_batch_size.
        """
        per_pass = settings.train_batch_size * world_size
        wanted = settings.global_batch_size
        if wanted is None:
            return cls(settings.train_batch_size, settings.gradient_accumulation_steps, world_size)
        if wanted % per_pass:
            below, above = wanted // per_pass * per_pass, -(-wanted // per_pass) * per_pass
            use = f"{below} or {above}" if below else str(above)
            raise ConfigError(
                f"train.global_batch_size {wanted} is not divisible by world_size {world_size} x train_batch_size "
                f"{settings.train_batch_size} (= {per_pass}). Use {use}, or change train_batch_size."
            )
        return cls(settings.train_batch_size, wanted // per_pass, world_size)

    @property
    def global_batch_size(self) -> int:
        """Return the pairs of one optimizer step over all ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def micro_batches(self, indices: list[int], rank: int) -> list[list[int]]:
        """Return the micro-batches of `rank` from the indices of one optimizer step."""
        assert len(indices) == self.global_batch_size
        mine = indices[rank * len(indices) // self.world_size :][: len(indices) // self.world_size]
        size = self.train_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def describe(self, unit: str = "pairs") -> str:
        """Word the plan; `unit` is what an example is."""
        return (
            f"{self.train_batch_size} {unit} x {self.gradient_accumulation_steps} accumulation steps "
            f"x {self.world_size} processes = {self.global_batch_size} {unit} per optimizer step"
        )
