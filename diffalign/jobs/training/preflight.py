"""What is wrong with a run, all of it at once, before a model is loaded: for `diffalign train` and its dry run alike.

Only what this machine can tell is looked at: paths, headers, tables, installed packages. Nothing is downloaded.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

import reward_models
from diffalign.backbones import inspection, quantization
from diffalign.config import Config
from diffalign.data import PairSource
from diffalign.denoising import acceleration
from diffalign.errors import ConfigError, UserError
from diffalign.jobs.devices import launched_processes
from diffalign.jobs.drawing.prompts import is_prompt_file, read_prompts
from diffalign.jobs.scoring import scorers
from diffalign.jobs.training import (
    assemble,
    examples,
    human_labels,
    identity,
    networks,
    online,
    online_costs,
    online_judges,
    storage,
)
from diffalign.places import is_hub_id
from diffalign.training import checkpoint, checkpoints, optimizer, zero
from diffalign.training.batching import BatchPlan
from reward_models.base import UNPUBLISHED


class Refused(UserError):
    """Report several things that would stop a run."""


@dataclass
class Findings:
    """Hold what was found out about a run before it starts."""

    faults: list[Exception] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth knowing, and no reason to stop
    source: PairSource | None = None  # the data, opened; None if it is on the hub, is prompts, or cannot be opened
    prompts: list[str] | None = None  # of data.prompts_file

    def attempt(self, check: Callable[[], Any]) -> Any:
        """Return what a check returns, or keep its error and return None."""
        try:
            return check()
        except (UserError, reward_models.ScorerError) as error:
            self.faults.append(error)
            return None

    def require(self) -> None:
        """Raise what was found: one fault as it is, several as a list."""
        if len(self.faults) == 1:
            raise self.faults[0]
        if self.faults:
            listed = "".join(f"\n{number}. {fault}" for number, fault in enumerate(self.faults, 1))
            raise Refused(f"{len(self.faults)} things would stop this run:{listed}")


def examine(
    config: Config, error_log: Path | None = None, source: PairSource | None = None, *, overwrite: bool = False
) -> Findings:
    """Look at everything that could stop a run later.

    Args:
        config: of the run.
        error_log: JSONL file for rows that cannot be used.
        source: the data, if it is open already.
        overwrite: the run may take the place of an earlier one.
    """
    found = Findings(faults=[*launch(config), *packages(config)], source=source)
    plan = found.attempt(lambda: BatchPlan.of(config.train, world_size()))
    model = config.model
    vae, unet_init = model.pretrained_vae_model_name_or_path, model.unet_init
    where = {"vae": vae, "unet_init": unet_init, "variant": model.variant}
    source, resolution = model.pretrained_model_name_or_path, config.data.resolution
    found.attempt(lambda: inspection.check(source, resolution, **where))
    found.attempt(lambda: assemble.check_path(config))
    found.attempt(lambda: examples.transform_of(config))
    if config.is_online:
        _examine_rollout(config, plan, found)
    else:
        _examine_data(config, error_log, found)
    given = config.validation.validation_prompts
    if isinstance(given, str) and is_prompt_file(given):
        found.attempt(lambda: read_prompts(given))
    if plan is not None:
        found.attempt(lambda: _examine_checkpoints(config, plan, found, overwrite))
    return found


def world_size() -> int:
    """Return how many processes train: as launched, else one for each GPU of this machine."""
    return int(os.environ.get("WORLD_SIZE", 0)) or max(launched_processes(), torch.cuda.device_count())


def launch(config: Config) -> Iterator[UserError]:
    """Yield what this machine lacks to start anything with this configuration."""
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        yield ConfigError('train.mixed_precision "fp16" needs a GPU; this machine has none. Use bf16 or no.')
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > devices > 0 and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        yield ConfigError(
            f"{here} processes were launched on a machine of {devices} GPU(s); each needs its own. Launch {devices}, "
            "or set ACCELERATE_USE_CPU=true."
        )
    for name in config.logging.report_to:
        if not installed(name):
            yield ConfigError(f'logging.report_to names "{name}", which is not installed: pip install {name}.')


def packages(config: Config) -> Iterator[UserError]:
    """Yield what this machine lacks to train with this configuration."""
    if config.optimizer.name == "adamw_8bit" and not installed("bitsandbytes"):
        yield ConfigError(optimizer.NO_BITSANDBYTES)
    if config.model.quantization != "none":
        try:
            quantization.require(config.model.quantization)
        except ConfigError as error:
            yield error
    if config.train.enable_xformers_memory_efficient_attention and not installed("xformers"):
        yield networks.no_xformers("xformers is not installed")
    if config.performance.reference_dtype == "fp8" and "reference" in config.build_objective().needs:
        try:
            acceleration.require_float8()
        except ConfigError as error:
            yield error
    if zero.asked() and not installed("deepspeed"):
        yield ConfigError(zero.NOT_INSTALLED)


def installed(package: str) -> bool:
    """Tell whether an optional package can be imported, without doing so."""
    return importlib.util.find_spec(package) is not None


def _examine_data(config: Config, error_log: Path | None, found: Findings) -> None:
    """Open local data and what lies over it."""
    data = config.data
    name = found.attempt(lambda: examples.scorer_of(config))
    if name is not None and data.annotations_file is None:
        found.attempt(lambda: _check_weights(data.scorer))
    if data.annotations_file is not None:
        found.attempt(lambda: examples.read_annotations(config, Path(data.annotations_file)))
    if is_hub_id(data.dataset_name or data.train_data_dir):
        if data.train_data_dir is not None:
            found.notes.append(f"{data.train_data_dir} is no file or folder here: it is asked for on the hub.")
        return
    source = found.source or found.attempt(lambda: examples.open_source(config, error_log))
    found.source = source
    if source is not None:
        images = source.images_per_example
        found.attempt(lambda: examples.check(config, source.name, images, source.has_preference, source.has_noises))
        if config.data.resolution % 8 == 0:  # else it is refused elsewhere
            found.attempt(lambda: storage.check_room(config, source))


def _examine_rollout(config: Config, plan: BatchPlan | None, found: Findings) -> None:
    """Read the prompts, and see who judges."""
    found.prompts = found.attempt(lambda: read_prompts(config.data.prompts_file, config.data.max_train_samples))
    found.attempt(lambda: _check_judge(config))
    judged = (config.rollout.scorer or "").startswith(f"{human_labels.LABELS}=")  # then fewer prompts are used
    if found.prompts and plan is not None and config.build_objective().layout == "transition" and not judged:
        gives = found.attempt(lambda: online_costs.examples_per_prompt(config))
        order = gives and found.attempt(lambda: online.transition_order(config, found.prompts, gives))
        if order:
            found.attempt(lambda: order.indices(0, plan.global_batch_size))


def _check_judge(config: Config) -> None:
    """Refuse judges that cannot judge this run, or are not there.

    Raises:
        UserError: such a judge.
    """
    place = human_labels.place_of(config) or online_judges.latent_reward_place(config)
    if place is None:
        online_judges.check(config)
        _check_weights(config.rollout.scorer)
    elif not place.is_dir():
        raise ConfigError(f'rollout.scorer "{config.rollout.scorer}": there is no folder {place}.')


def _check_weights(wanted: str) -> None:
    """Refuse reward models whose weights are a path that does not exist, or that nobody has published.

    Raises:
        ConfigError: such a reward model.
    """
    for name, place in scorers.parse(wanted).items():
        if name in scorers.OWN or scorers.plugin(name) is not None:
            continue
        if place is not None:
            scorers.located(name, place)
        elif reward_models.card(name).weights == UNPUBLISHED:
            raise ConfigError(f"Nobody has published weights for {name}: write {name}=PATH of your own.")


def _examine_checkpoints(config: Config, plan: BatchPlan, found: Findings, overwrite: bool) -> None:
    """See whether a run that is to be continued can be, and what a fresh one would find in its folder."""
    folder, wanted = Path(config.train.output_dir), config.train.resume_from_checkpoint
    path = checkpoints.find(folder, wanted) if wanted else None
    if path is not None:
        checkpoint.check(path, identity.settings_identity(config, plan), config.train.max_train_steps)
        found.notes.append(f"Continues from {path}.")
    elif not overwrite:
        require_unused(config)
    elif earlier := checkpoints.folders(folder):
        found.notes.append(
            f"{folder} holds {', '.join(path.name for path in earlier)} of an earlier run, which this one replaces: "
            "they are set aside when it starts. Add --resume latest to continue it instead."
        )


def require_unused(config: Config) -> None:
    """Refuse a fresh run where an earlier one has left checkpoints.

    Raises:
        ConfigError: it has.
    """
    folder = Path(config.train.output_dir)
    earlier = [] if config.train.resume_from_checkpoint else checkpoints.folders(folder)
    if earlier:
        raise ConfigError(
            f"{folder} holds {', '.join(path.name for path in earlier)} of an earlier run. Continue that with --resume "
            "latest, replace it with --overwrite, or name another train.output_dir."
        )
