"""What a diffusers scheduler config (`scheduler/scheduler_config.json`) says of its noise path."""

from collections.abc import Mapping
from typing import Any

from diffalign.errors import ConfigError, suggestion

FLOW_PREDICTION = "flow_prediction"  # the name of multistep solvers for v = noise - x0


def is_flow(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is of flow matching rather than of DDPM.

    Solvers for both name a prediction type, or say that they use flow sigmas; schedulers of flow matching alone are
    known by their class, or, where only the arguments are kept, by a shift without betas.
    """
    if config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW_PREDICTION:
        return True
    if "prediction_type" in config or any(key in config for key in ("beta_schedule", "beta_start", "trained_betas")):
        return False
    return str(config.get("_class_name", "")).startswith("FlowMatch") or "shift" in config


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value of a scheduler config is one of the choices."""
    if value not in choices:
        hint = suggestion(str(value), choices)
        raise ConfigError(f'Unsupported {key} "{value}" of the noise scheduler.{hint} Supported: {", ".join(choices)}.')
