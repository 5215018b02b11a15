"""Optimizers and learning rates. The learning rate is a pure function of the step, so resuming needs no state."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffalign.errors import ConfigError
from diffalign.training import sharding
from diffalign.training.settings import OptimizerSettings

NO_BITSANDBYTES = 'optimizer.name "adamw_8bit" needs bitsandbytes: pip install "diffalign[gpu]", or use "adamw".'


def peak_learning_rate(settings: OptimizerSettings, global_batch_size: int) -> float:
    """Return the rate after warm-up; with scale_lr it is per pair and grows with the global batch."""
    return settings.learning_rate * (global_batch_size if settings.scale_lr else 1)


def learning_rate_factor(settings: OptimizerSettings, step: int, max_train_steps: int) -> float:
    """Return the share of the peak rate used by optimizer step `step` (0-based), in [0, 1].

    The shapes are those of diffusers' schedulers of the same names, except that the first step of a warm-up already
    moves: factor (step + 1) / lr_warmup_steps where diffusers has step / lr_warmup_steps.
    """
    warmup = settings.lr_warmup_steps if settings.lr_scheduler != "constant" else 0
    if step < warmup:
        return (step + 1) / warmup
    if settings.lr_scheduler in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(max_train_steps - warmup, 1)
    if settings.lr_scheduler == "linear":
        return max(1.0 - progress, 0.0)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer over float32 parameters; the trainer sets its learning rate before every step.

    Raises:
        ConfigError: adamw_8bit without bitsandbytes.
    """
    parameters = list(parameters)
    if settings.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(  # the arguments of Diffusion-DPO's SDXL runs
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.adam_weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    adam = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError(NO_BITSANDBYTES) from None
        return AdamW8bit(parameters, **adam)
    return torch.optim.AdamW(parameters, **adam, fused=True)


def named_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Return the state of every parameter under its name, {} before the first step; sharded where the parameter is.

    parameters: those the optimizer was built over, in that order.
    """
    state = optimizer.state_dict()["state"]
    return {name: state[index] for index, name in enumerate(parameters) if index in state}


def load_named_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]
) -> None:
    """Give an optimizer over `parameters` a state of `named_state` that is whole again, on any number of ranks."""
    state = {
        index: {key: sharding.cut(value, parameters[name]) for key, value in saved[name].items()}
        for index, name in enumerate(parameters)
        if name in saved
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
