"""DeepSpeed's ZeRO-1 and 2: whole weights on every process, the optimizer's state (2: and the gradients) in parts.

accelerate 1.15 starts a single process when it runs DeepSpeed on the CPU (`PartialState` finds no backend), and its
engine steps inside the backward pass, before loss and gradient are checked. So accelerate is told of DDP, DeepSpeed's
engine is made here, and the trainer decides when it steps.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from torch import Tensor, nn

from diffalign.errors import ConfigError

ASKED = "ACCELERATE_USE_DEEPSPEED"
NOT_INSTALLED = 'DeepSpeed is not installed: pip install "diffalign[deepspeed]".'
OFFLOADS = ("offload_optimizer", "offload_param")


def asked() -> bool:
    """Tell whether this process was launched with DeepSpeed."""
    return os.environ.get(ASKED, "false").lower() == "true"


@contextmanager
def as_ddp() -> Iterator[None]:
    """Let an Accelerator that is created in this context see a launch with DDP."""
    value = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[ASKED] = value


def wanted(accelerator: Accelerator) -> bool:
    """Tell whether an engine is needed; one process holds everything and needs none."""
    return asked() and accelerator.num_processes > 1


def check(mixed_precision: str) -> None:
    """Refuse kinds of DeepSpeed that do not work here, before a network is loaded.

    Raises:
        ConfigError: DeepSpeed is not installed, a stage other than 1 and 2, weights or state offloaded, or fp16.
    """
    if not is_deepspeed_available():
        raise ConfigError(NOT_INSTALLED)
    section = _section()
    if section["stage"] not in (1, 2):
        raise ConfigError(
            f"DeepSpeed's zero_stage {section['stage']} is not supported: 1 and 2 are. What 3 does, FSDP2 does: "
            "--config_file configs/accelerate/fsdp2.yaml."
        )
    for name in OFFLOADS:
        device = section.get(name, {}).get("device", "none")
        if device != "none":
            raise ConfigError(f'DeepSpeed\'s {name}_device "{device}" is not supported. Set it to none.')
    if mixed_precision == "fp16":
        raise ConfigError('train.mixed_precision "fp16" does not work with DeepSpeed. Use bf16 or no.')


def stage() -> int:
    """Return what the launch asks for: 1 cuts the optimizer's state, 2 the gradients too."""
    return _section()["stage"]


def _section() -> dict[str, Any]:
    return DeepSpeedPlugin().deepspeed_config["zero_optimization"]  # reads what accelerate launch left behind


@dataclass(frozen=True)
class Part:
    """Name a state of a parameter that the processes hold in parts."""

    parameter: nn.Parameter
    key: str

    def full_tensor(self) -> Tensor:
        """Return it whole; every process must call this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(self.parameter, self.key)


class _Front(nn.Module):
    """Show the parameters of `module`, and run another function."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class ZeroOptimizer:
    """Let the trainer use an engine as it uses an optimizer.

    Args:
        engine: DeepSpeed's.
        parameters: what it trains, in the order of the optimizer.
    """

    def __init__(self, engine: Any, parameters: list[nn.Parameter]):
        self.engine, self.parameters = engine, parameters
        self.base = engine.optimizer.optimizer  # torch's, over this process's part of the flattened parameters
        (self.group,) = self.base.param_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return torch's parameter groups, where learning rates are set."""
        return self.base.param_groups

    def clip(self, max_norm: float) -> Tensor:
        """Return the norm of the gradients over all processes, nan if not finite; `step` will clip it to max_norm."""
        self.engine.optimizer.clip_grad = max_norm
        norm = torch.as_tensor(self.engine.optimizer.scaled_global_norm())
        return torch.where(norm < 0, torch.nan, norm)  # -1 is DeepSpeed's word for it

    def step(self) -> None:
        """Clip, move, send every process the weights that others moved, and drop the gradients."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` has done it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state by number as torch's optimizers do, tensors as `Part`s."""
        (flat,) = self.group["params"]
        shared = self.base.state[flat]
        state = {
            # A step of its own for each: torch moves on every one.
            index: {key: Part(p, key) if value.ndim else value.clone() for key, value in shared.items()}
            for index, p in enumerate(self.parameters if shared else ())
        }
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over whole tensors, and the parameters as they are now."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        (flat,) = self.group["params"]
        states = saved["state"]
        for key, value in next(iter(states.values()), {}).items():
            self.base.state[flat][key] = torch.zeros_like(flat) if value.ndim else value.to(flat.device)
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()  # the first step would do it, too late
        for index, parameter in enumerate(self.parameters):
            safe_set_full_fp32_param(parameter, parameter.detach())
            for key, value in states.get(index, {}).items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def prepare(
    accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, ZeroOptimizer]:
    """Return `policy` run by an engine, under accelerate's autocast, and what the engine makes of `optimizer`."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator.device.type)
    import deepspeed

    (group,) = optimizer.param_groups
    parameters = list(group["params"])
    network = accelerator.prepare_model(policy, evaluation_mode=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # of no consequence: the trainer divides batches and losses
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {key: value for key, value in _section().items() if key not in OFFLOADS},
    }
    trained = _Front(nn.ParameterList(parameters), network.__call__)  # it takes no frozen bfloat16 beside float32
    engine, *_ = deepspeed.initialize(model=trained, optimizer=optimizer, config=config)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # ZeRO-2 knows no `no_sync`

    def run(*args: Any, **kwargs: Any) -> Any:
        engine.set_gradient_accumulation_boundary(accelerator.sync_gradients)
        return engine(*args, **kwargs)

    return _Front(network, run), ZeroOptimizer(engine, parameters)
