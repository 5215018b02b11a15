"""The columns of a grid: models, a run's checkpoints over time, or one model under a sweep of a setting."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.errors import UserError, suggestion
from diffalign.evaluation import SamplingSettings
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.checkpoints import is_checkpoint

SWEEPS = ("guidance_scale", "steps", "lora_scale")


@dataclass(frozen=True)
class Column:
    """Say what is drawn in one column, and under which name."""

    name: str
    model: models.Model
    settings: SamplingSettings
    lora_scale: float = 1.0  # 0 is the base model


@dataclass(frozen=True)
class Sweep:
    """Name a setting and its values."""

    setting: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Read "guidance_scale=1,3,5"; raise UserError for anything else."""
        setting, _, listed = text.partition("=")
        if setting not in SWEEPS:
            hint = suggestion(setting, SWEEPS)
            raise UserError(f'--sweep takes {", ".join(SWEEPS)}, as in guidance_scale=1,3,5; got "{text}".{hint}')
        try:
            values = tuple(float(value) for value in listed.split(","))
        except ValueError:
            raise UserError(f'--sweep {setting} takes numbers between commas, got "{listed}".') from None
        if len(set(values)) < len(values):
            raise UserError(f"--sweep {setting} names a value twice: {listed}.")
        if setting == "steps" and any(value != int(value) for value in values):
            raise UserError(f"--sweep steps takes whole numbers, got {listed}.")
        return cls(setting, values)


def checkpoints_of(specs: Sequence[str]) -> list[str]:
    """Return the checkpoints of the runs named, in order of their steps, each under the name of its step.

    Raises:
        UserError: one of them is no run, or keeps no checkpoint.
    """
    found = []
    for spec in specs:
        name, place = models.split_name(spec)
        folder = Path(place).expanduser()
        steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if is_checkpoint(path)}
        if not steps:
            raise UserError(f'--checkpoints needs training runs, but "{place}" has no checkpoint-STEP of one.')
        prefix = f"{name or folder.name}, " if len(specs) > 1 else ""
        found += [f"{prefix}step {step}={steps[step]}" for step in sorted(steps)]
    return found


def swept(wanted: Sequence[models.Model], settings: SamplingSettings, sweep: Sweep | None) -> list[Column]:
    """Return a column for every model and value; a base model under a sweep of the LoRA's scale is one column.

    Raises:
        UserError: a value that cannot be drawn with, a scale where there is no LoRA.
    """
    if sweep is None:
        return [Column(model.name, model, settings) for model in wanted]
    if sweep.setting == "lora_scale" and all(model.weights is None for model in wanted):
        raise UserError("--sweep lora_scale has no effect: none of the models is a LoRA.")
    columns = []
    for model in wanted:
        if sweep.setting == "lora_scale" and model.weights is None:
            columns.append(Column(model.name, model, settings))
            continue
        prefix = f"{model.name}, " if len(wanted) > 1 else ""
        columns += [_at(model, settings, sweep.setting, value, prefix) for value in sweep.values]
    return columns


def _at(model: models.Model, settings: SamplingSettings, setting: str, value: float, prefix: str) -> Column:
    name = f"{prefix}{setting.replace('_', ' ')} {value:g}"
    if setting == "lora_scale":
        return Column(name, model, settings, lora_scale=value)
    key, value = ("num_inference_steps", int(value)) if setting == "steps" else (setting, value)
    return Column(name, model, replace(settings, **{key: value}))
