"""`diffalign.load_config` and `diffalign.train`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import config as configuration
from diffalign.api.common import PathLike, telling
from diffalign.config import Config

if TYPE_CHECKING:
    import pandas as pd  # takes longer than reading a configuration

ConfigLike = PathLike | Mapping[str, Any] | Config


@dataclass(frozen=True, kw_only=True)
class Run(os.PathLike[str]):
    """Hold what a training run left. It stands for its folder wherever a model is asked for."""

    output_dir: Path
    config: Config
    metrics: dict[str, float]  # the last line of metrics.jsonl

    @property
    def weights(self) -> Path:
        """The LoRA file, or the folder of the UNet if all of it was trained."""
        return self.output_dir / ("unet" if self.config.model.tune == "full" else "pytorch_lora_weights.safetensors")

    @property
    def history(self) -> "pd.DataFrame":
        """All lines of metrics.jsonl, one row each."""
        import pandas as pd

        from diffalign.training.metrics import read

        return pd.DataFrame(read(self.output_dir / "metrics.jsonl"))

    def __fspath__(self) -> str:
        return str(self.output_dir)

    def _repr_markdown_(self) -> str:
        """Show in a notebook where the weights are and the last metrics."""
        head = f"`{self.weights}`, {self.config.objective_name}, {self.config.train.max_train_steps} steps"
        return "\n".join([head, "", "| metric | last |", "| --- | --- |", *self._lines()])

    def _lines(self) -> list[str]:
        return [f"| {name} | {value:.4g} |" for name, value in self.metrics.items()]


def load_config(config: ConfigLike, *overrides: str | Mapping[str, Any], **values: Any) -> Config:
    """Return the configuration of a training run, with changes, checked.

    Args:
        config: a YAML file, the name of a shipped one such as "tiny/dpo", a dictionary of sections, or a Config.
        overrides: "key=value" as on the command line, or dictionaries: {"optimizer.learning_rate": 1e-6}.
        values: keys that are unique among all sections, max_train_steps=20, or sections, train={"seed": 1}.

    Raises:
        ConfigError: there is no such configuration, a key is unknown, or a value has the wrong type or range.

    Example:
        config = diffalign.load_config("tiny/dpo", "train.seed=1", max_train_steps=20)
    """
    words = [override for override in overrides if isinstance(override, str)]
    tables = [override for override in overrides if not isinstance(override, str)]
    changes = {key: value for table in (*tables, values) for key, value in table.items()}
    if isinstance(config, Config | Mapping):
        return configuration.change(config, words, changes)
    return configuration.load(os.fspath(config), words, changes)


def train(
    config: ConfigLike,
    *overrides: str | Mapping[str, Any],
    resume: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **values: Any,
) -> Run:
    """Align a model with preferences; return what the run left in train.output_dir.

    The process stays as it was: random generators, accelerate's state and precision flags are put back, so that one
    notebook can train several times, in other precisions too. Interrupted, a run saves the step at work (the second
    interrupt ends it at once) and continues with resume="latest".

    Args:
        config: as of `load_config`, and so are `overrides` and `values`.
        resume: a checkpoint's folder, or "latest"; starts afresh if there is no latest.
        overwrite: take the place of an earlier run in train.output_dir, which is refused otherwise.
        quiet: say nothing and show no progress.

    Raises:
        UserError: a configuration, data or model that cannot be used; a loss that is not finite.

    Example:
        run = diffalign.train("tiny/dpo", max_train_steps=20, output_dir="runs/first")
        run.metrics["loss"], run.weights
    """
    from diffalign.jobs.training.train import train as job
    from diffalign.training.undisturbed import undisturbed

    if resume is not None:
        values = {**values, "train.resume_from_checkpoint": resume}
    checked = load_config(config, *overrides, **values)
    with undisturbed(), telling(quiet) as console:
        # by itself it tells on the main process only
        metrics = job(checked, console if quiet else None, overwrite=overwrite)
    return Run(output_dir=Path(checked.train.output_dir), config=checked, metrics=metrics)
