"""What a run over several processes cannot do, said before anything is loaded."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffalign.config import Config
from diffalign.denoising import INVERSIONS
from diffalign.errors import ConfigError
from diffalign.training import sharding


def check(config: Config, accelerator: Accelerator) -> None:
    """Refuse settings that would stop or be wrong under the way this run was launched.

    With FSDP2 every pass of a network is taken by all processes together; what makes their number depend on the
    examples of a process would wait forever.

    Raises:
        ConfigError: such a setting, with what to use instead.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED or _asks("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "DeepSpeed is not supported: its engine clips and steps before the loss can be checked. FSDP2 shards "
            "weights, gradients and optimizer state as ZeRO-3 does: --config_file configs/accelerate/fsdp2.yaml."
        )
    if not sharding.wanted(accelerator):
        return
    sharding.check(config.train.mixed_precision)
    for setting, refused, instead in (
        (f'objective.name "{config.objective_name}"', config.is_online, "an objective that learns from given images"),
        (f'denoising.noising "{config.noising}"', config.noising in INVERSIONS, "a noising without inversion"),
        (f'reference.update "{config.reference.update}"', config.reference.update != "fixed", "fixed"),
        (f'optimizer.name "{config.optimizer.name}"', config.optimizer.name != "adamw", "adamw"),
        ('performance.compile "full"', config.performance.compile == "full", "regional or none"),
    ):
        if refused:
            raise ConfigError(
                f"{setting} does not work with FSDP2. Use {instead}, or launch with configs/accelerate/ddp.yaml, which "
                "is faster wherever the model fits (docs/distributed.md)."
            )


def _asks(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
