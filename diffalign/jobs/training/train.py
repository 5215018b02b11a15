"""`diffalign train`: from a configuration to an aligned model that diffusers loads."""

import json
import os
import platform
import sys
from contextlib import nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from diffalign import config as configuration
from diffalign.backbones import export
from diffalign.backbones.base import Backbone
from diffalign.backbones.files import LORA_FILE
from diffalign.config import Config
from diffalign.data import PairSource
from diffalign.folder_lock import held
from diffalign.interrupts import Interrupted
from diffalign.jobs import skipped
from diffalign.jobs.devices import together_on_cpus
from diffalign.jobs.training import (
    assemble,
    distributed,
    examples,
    hub,
    identity,
    long_captions,
    memory,
    model_card,
    networks,
    online,
    preflight,
    reference_errors,
    static,
    storage,
    validation,
)
from diffalign.objectives.base import UNITS
from diffalign.training import zero
from diffalign.training.batching import BatchPlan
from diffalign.training.checkpoint import WeightsFile
from diffalign.training.ranks import together
from diffalign.training.trainer import Sampler, Trainer

PACKAGES = (
    *("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate"),
    *("xformers", "bitsandbytes", "torchao"),
)


def train(config: Config, console: Console | None = None, *, overwrite: bool = False) -> dict[str, float]:
    """Run a training job; return its last metrics. Its folder is its own until it ends.

    Leaves in `train.output_dir`: config.yaml, environment.json, metrics.jsonl, checkpoints, the LoRA
    (pytorch_lora_weights.safetensors) or the denoiser (unet/ or transformer/), README.md, and validation grids if
    asked for.

    Args:
        config: of the run.
        console: where to tell of it; None: here, from the main process.
        overwrite: take the place of an earlier run in the folder.
    """
    output_dir = Path(config.train.output_dir)
    found = preflight.examine(config, output_dir / skipped.FILE, overwrite=overwrite)
    found.require()
    with held(output_dir) if os.environ.get("RANK", "0") == "0" else nullcontext():
        if not overwrite:
            preflight.require_unused(config)  # another run may have ended meanwhile
        return _train(config, found, console)


def _train(config: Config, found: preflight.Findings, console: Console | None) -> dict[str, float]:
    output_dir = Path(config.train.output_dir)
    accelerator = make_accelerator(config)
    distributed.check(config, accelerator)
    console = console or Console(quiet=not accelerator.is_main_process)
    repo = hub.check(config) if accelerator.is_main_process else None
    trainer, backbone = build_trainer(config, accelerator, console, found.source)
    unit = UNITS[config.build_objective().layout]
    console.print(f"Batch: {trainer.plan.describe(unit)}. Learning rate {trainer.peak:.3g}.")
    distributed.announce(trainer, console)
    if accelerator.is_main_process:
        write_provenance(output_dir, config, trainer.identity)
    start_trackers(config, accelerator)
    try:
        with together(accelerator.num_processes):
            line = trainer.fit()
    except Interrupted:
        accelerator.end_training()  # trackers write what they hold
        raise
    weights = trainer.weights()  # on every process: those of FSDP2 hold parts
    if accelerator.is_main_process:
        export_model(config, backbone, output_dir, weights)
        told = {"pipeline": backbone.own_pipeline.__name__, "processes": accelerator.num_processes}
        card = model_card.render(config, backbone.family, line, repo=repo, **told)
        (output_dir / "README.md").write_text(card, encoding="utf8")
        console.print(f"Done: {output_dir}")
        if repo is not None:
            hub.push(config, repo, console)
    accelerator.end_training()
    return line


def build_trainer(
    config: Config, accelerator: Accelerator, console: Console, source: PairSource | None = None
) -> tuple[Trainer, Backbone]:
    """Load model and data of a run (unless `source` is given) and return what trains, with the model."""
    set_seed(config.train.seed)  # only what is not keyed by example: LoRA dropout
    plan = BatchPlan.of(config.train, accelerator.num_processes)
    backbone = assemble.load_backbone(config)
    if config.is_online:
        source = online.open_prompts(config, backbone)
    elif source is None:
        source = examples.open_source(config, Path(config.train.output_dir) / skipped.FILE)
        storage.check_room(config, source)
    console.print(f"Data: {source.name}: {source.counts}.")
    long_captions.tell(config, backbone, source, console)
    known = identity.run_identity(config, plan, backbone, source)
    step, sampler, reference = learning(config, backbone, source, plan, accelerator, console)
    if not config.is_online:
        skipped.tell(source.rejects, console)
        skipped.follow(source.rejects, console)  # without a cache, images are decoded as training meets them
    hooks = {"step": step, "reference": reference and reference.moving, "auto_beta": step.auto_beta}
    hooks["behavior"] = getattr(step, "behavior", None)
    trainer = Trainer(
        accelerator=accelerator,
        policy=backbone.denoiser,
        loss=step,
        sampler=sampler,
        plan=plan,
        train=config.train,
        optimizer=config.optimizer,
        logging=config.logging,
        identity=known,
        weights_file=weights_file(config, backbone),
        on_step=validation.drawer(config, backbone, accelerator),
        hooks={name: hook for name, hook in hooks.items() if hook is not None},
        static=static.static_step(config, step, backbone.denoiser, accelerator, console),
        repeated_blocks=backbone.repeated_blocks,
        console=console,
    )
    return trainer, backbone


def learning(
    config: Config, backbone: Backbone, source: Any, plan: BatchPlan, accelerator: Accelerator, console: Console
) -> tuple[Any, Sampler, networks.Reference | None]:
    """Return the loss function of a run, the order of its examples, and the reference if there is one."""
    average = partial(accelerator.reduce, reduction="mean")
    kind = _checkpointing(config, plan, backbone, console)
    if config.is_online:
        reference = networks.prepare_networks(config, backbone, accelerator, kind)
        if config.build_objective().layout == "reward":
            step = online.reward_step(config, backbone, source, accelerator.device)
        else:
            step = online.online_step(config, backbone, source, reference, accelerator.device, average)
        return step, step.order, reference
    data = examples.open_examples(config, backbone, source, accelerator, console)
    stored = reference_errors.open_stored(config, backbone, data, accelerator, console)
    reference = networks.prepare_networks(config, backbone, accelerator, kind, stored)
    step = assemble.preference_step(config, backbone, data, reference, average, stored)
    return step, examples.order(config, data, source, plan.global_batch_size), reference


def _checkpointing(config: Config, plan: BatchPlan, backbone: Backbone, console: Console) -> memory.Kind:
    """Decide which activations are recomputed, and say why if it was decided here."""
    total = sum(p.numel() for p in backbone.denoiser.parameters())
    trained = total if config.model.tune == "full" else 0  # adapters are small beside what they adapt
    encoders = sum(p.nbytes for module in backbone.encoders() for p in module.parameters())
    counts = memory.Counts(backbone.family, backbone.denoiser, total, trained, encoders)
    decided = memory.checkpointing(config, plan, counts)
    if config.train.gradient_checkpointing == "auto" and torch.cuda.is_available():
        console.print(f"Gradient checkpointing: {decided.why}.")
    return decided.kind


def weights_file(config: Config, backbone: Backbone) -> WeightsFile:
    """Return how checkpoints keep what is trained: a LoRA as diffusers loads it, all weights by their names."""
    if config.model.tune == "full":
        return WeightsFile()
    base = configuration.portable(config).model.pretrained_model_name_or_path
    header = export.lora_header(backbone.denoiser, base, lora_metadata(config, backbone))
    return WeightsFile(LORA_FILE, export.lora_keys(backbone.denoiser), header)


def lora_metadata(config: Config, backbone: Backbone) -> dict[str, Any]:
    """Return what the files of a run say about it, besides the number of steps."""
    return {"objective": config.objective_name, "prediction_type": backbone.path.prediction_type}


def make_accelerator(config: Config) -> Accelerator:
    """Create the accelerator; `accelerate launch` decides about devices and processes.

    Raises:
        UserError: this machine lacks a GPU or packages that the configuration asks for.
    """
    train, trackers = config.train, list(config.logging.report_to)
    preflight.Findings(faults=list(preflight.launch(config))).require()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.allow_tf32
    precision = "no" if config.pure_bf16 else train.mixed_precision  # no autocast around bfloat16 weights
    with zero.as_ddp():
        accelerator = Accelerator(
            cpu=together_on_cpus(), mixed_precision=precision, log_with=trackers or None, project_dir=train.output_dir
        )
    distributed.require_all(accelerator)
    return accelerator


def start_trackers(config: Config, accelerator: Accelerator) -> None:
    """Open the trackers and hand them the flat configuration."""
    if not config.logging.report_to:
        return
    flat = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}
    accelerator.init_trackers(config.logging.tracker_name, config=plain)


def write_provenance(output_dir: Path, config: Config, identity: dict[str, Any]) -> None:
    """Write down what this run is: resolved configuration, versions, command, identity of data and model."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(configuration.dump(configuration.portable(config)), encoding="utf8")
    record = {"command": " ".join(sys.argv), "versions": versions(), "identity": identity}
    (output_dir / "environment.json").write_text(json.dumps(record, indent=1), encoding="utf8")


def versions() -> dict[str, str]:
    """Return the versions of Python, this machine's system and the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        if _installed(package):
            found[package] = version(package)
    return found


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def export_model(config: Config, backbone: Backbone, output_dir: Path, weights: dict[str, Tensor]) -> None:
    """Write the trained `weights` in the formats of diffusers (and kohya, if asked for)."""
    base = configuration.portable(config).model.pretrained_model_name_or_path
    metadata = lora_metadata(config, backbone) | {"training_steps": config.train.max_train_steps}
    if config.model.tune == "full":
        export.save_denoiser(backbone.denoiser, output_dir, state_dict=weights)
    else:
        export.save_lora(backbone.denoiser, output_dir, base, metadata, state_dict=weights)
        if config.lora.export_kohya:
            file = output_dir / "kohya" / f"{output_dir.name}.safetensors"
            prediction_type = backbone.path.prediction_type
            export.save_kohya_lora(
                backbone.denoiser, file, base, metadata, prediction_type=prediction_type, state_dict=weights
            )
