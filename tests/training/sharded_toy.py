"""Train the toy several times on the processes this is launched on; run by test_sharding.py under torchrun."""

import sys
from pathlib import Path

from diffalign.training import sharding
from tests.training import toy

COMMON = {"micro": 1, "accumulate": 2, "use_ema": True, "ema_decay": 0.5, "checkpointing_steps": 3}
WITHOUT_LIMIT = {"checkpoints_total_limit": None}


def main(directory: Path) -> None:
    """Train straight through, in two halves, and on from what one process left in `one`."""
    straight = toy.trainer(directory / "straight", **COMMON, **WITHOUT_LIMIT)
    assert sharding.is_sharded(straight.policy)
    straight.fit()
    toy.trainer(directory / "halves", **COMMON, max_train_steps=3).fit()
    toy.trainer(directory / "halves", **COMMON, resume_from_checkpoint="latest").fit()
    start = str(directory / "one" / "checkpoint-3")
    toy.trainer(directory / "continued", **COMMON, resume_from_checkpoint=start).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
