"""What a run over several processes cannot do, said before anything is loaded."""

from accelerate import Accelerator
from rich.console import Console

from diffalign.config import Config
from diffalign.denoising import INVERSIONS
from diffalign.errors import ConfigError
from diffalign.jobs.devices import launched_processes
from diffalign.training import sharding, zero
from diffalign.training.trainer import Trainer


def check(config: Config, accelerator: Accelerator) -> None:
    """Refuse settings that would stop or be wrong under the way this run was launched.

    With FSDP2 every pass of a network is taken by all processes together; what makes their number depend on the
    examples of a process would wait forever. DeepSpeed's engine sums no gradients after a backward pass through several
    forward passes.

    Raises:
        ConfigError: such a setting, with what to use instead.
    """
    precision = config.train.mixed_precision
    if zero.wanted(accelerator):
        zero.check(precision)
        launched, together = "DeepSpeed", False
    elif sharding.wanted(accelerator):
        sharding.check(precision)
        launched, together = "FSDP2", True
    else:
        return
    quantized = config.model.quantization  # neither cuts up what is no plain tensor
    several = not together and config.build_objective().layout == "reward"
    for setting, refused, instead in (
        (f'objective.name "{config.objective_name}"', together and config.is_online, "one with given images"),
        (f'objective.name "{config.objective_name}"', several, "one without a reward's gradient"),
        (f'denoising.noising "{config.noising}"', together and config.noising in INVERSIONS, "one without inversion"),
        (f'reference.update "{config.reference.update}"', together and config.reference.update != "fixed", "fixed"),
        ('performance.reference_dtype "fp8"', together and config.performance.reference_dtype == "fp8", "policy"),
        (f'optimizer.name "{config.optimizer.name}"', config.optimizer.name != "adamw", "adamw"),
        (f'model.quantization "{quantized}"', quantized != "none", "none"),
        ('performance.compile "full"', config.performance.compile == "full", "regional or none"),
    ):
        if refused:
            raise ConfigError(
                f"{setting} does not work with {launched}. Use {instead}, or launch with configs/accelerate/ddp.yaml, "
                "which is faster wherever the model fits (docs/distributed.md)."
            )


def require_all(accelerator: Accelerator) -> None:
    """Refuse a launch of several processes that would each train alone, all into one folder.

    Raises:
        ConfigError: the processes do not know of each other.
    """
    if (launched := launched_processes()) != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but each would train alone ({accelerator.num_processes} of them in "
            "this job). Launch with accelerate or torchrun; on CPUs set ACCELERATE_USE_CPU=true."
        )


def announce(trainer: Trainer, console: Console) -> None:
    """Say what of a run is cut over the processes, if anything is."""
    processes = trainer.accelerator.num_processes
    if zero.wanted(trainer.accelerator):
        what = {1: "optimizer state", 2: "gradients and optimizer state"}[zero.stage()]
        console.print(f"DeepSpeed ZeRO-{zero.stage()}: {what} in {processes} parts.")
    elif sharding.is_sharded(trainer.policy):
        console.print(f"FSDP2: weights, gradients and optimizer state in {processes} parts.")
