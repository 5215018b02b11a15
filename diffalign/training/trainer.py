"""The training loop. It knows steps, ranks and files, and nothing about diffusion."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.console import Console
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.interrupts import Asked, deferred
from diffalign.progress import Progress
from diffalign.training import checkpoint, checkpoints, optimizer, sharding
from diffalign.training.batching import BatchPlan
from diffalign.training.hooks import StepHook
from diffalign.training.metrics import MetricsLog, RunningMean
from diffalign.training.settings import LoggingSettings, OptimizerSettings, TrainSettings
from diffalign.training.static_step import StaticStep


class NonFiniteLoss(UserError):
    """Report a loss or gradient that is not a number; the weights are those of the step before."""


class Sampler(Protocol):
    """Tell which examples come next."""

    def indices(self, position: int, count: int) -> list[int]:
        """Return examples number `position` to `position + count - 1` of the endless sequence of epochs."""


LossFunction = Callable[[nn.Module, list[int], int], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Trainer:
    """Minimise a loss over examples drawn in order.

    Args:
        accelerator: devices, precision, processes, trackers.
        policy: the network, not yet prepared by accelerate; its parameters that require a gradient are trained.
        loss: given the network, example indices and the step, returns losses [B] and metrics [B].
        identity: what a checkpoint must agree on to be resumed: settings, data, model.
        on_step: called with the network and the number of finished steps, e.g. to draw validation pictures.
        hooks: told of every step, their state saved under their names.
        weights_file: how checkpoints keep the trained weights.
        static: takes micro-steps in the place of `loss`, from recordings; gradients then stay where they are.
        repeated_blocks: classes of the network's parts, which FSDP makes whole one at a time.
    """

    accelerator: Accelerator
    policy: nn.Module
    loss: LossFunction
    sampler: Sampler
    plan: BatchPlan
    train: TrainSettings
    optimizer: OptimizerSettings
    logging: LoggingSettings
    identity: dict[str, Any] = field(default_factory=dict)
    on_step: Callable[[nn.Module, int], None] | None = None
    hooks: Mapping[str, StepHook] = field(default_factory=dict)
    weights_file: checkpoint.WeightsFile = field(default_factory=checkpoint.WeightsFile)
    static: StaticStep | None = None
    repeated_blocks: Sequence[str] = ()
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.train.output_dir)
        self.accelerator.gradient_accumulation_steps = self.plan.gradient_accumulation_steps
        sharding.shard(self.policy, self.accelerator, self.repeated_blocks)
        self.parameters = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        unprepared = optimizer.build(self.parameters.values(), self.optimizer)
        self.network, self.torch_optimizer = sharding.prepare(self.accelerator, self.policy, unprepared)
        averaged = list(self.parameters.values())  # prepared first: the average lives on their device
        self.ema = EMAModel(averaged, decay=self.optimizer.ema_decay) if self.optimizer.use_ema else None
        self.peak = optimizer.peak_learning_rate(self.optimizer, self.plan.global_batch_size)
        self.metrics = RunningMean()
        # Whatever follows examples is a function of seed, step and example; dropout draws from the global generator.
        drops = (part for part in self.policy.modules() if isinstance(part, nn.Dropout))
        self.has_dropout = any(part.p > 0 for part in drops)

    def fit(self) -> dict[str, float]:
        """Train to max_train_steps, from a checkpoint if asked to; return the last line of metrics.

        A signal to stop is heeded after the step at work, by all processes after the same one.

        Raises:
            Interrupted: such a signal; the step is saved.
        """
        done = self._resume()
        pairs = self.plan.global_batch_size
        log = MetricsLog(self.output_dir / "metrics.jsonl", self.accelerator, done, pairs)
        line = log.last
        self.network.train()
        with self._progress(done) as shown, deferred() as asked:
            for step in range(done, self.train.max_train_steps):
                stopping = self._optimizer_step(step, self.sampler.indices(step * pairs, pairs), asked)
                finished = step + 1
                last = finished == self.train.max_train_steps
                if finished % self.logging.logging_steps == 0 or last:
                    line = log.write(finished, self.metrics.pop(self.accelerator))
                    shown.reach(finished, note=_note(line))
                with log.paused():
                    if finished % self.train.checkpointing_steps == 0 or last or stopping:
                        self._save(finished)
                    if self.on_step is not None:
                        self.on_step(self.policy, finished)
                shown.reach(finished)
                if stopping:
                    raise asked.stop(
                        f"Stopped after step {finished} of {self.train.max_train_steps}, which is saved in "
                        f"{self.output_dir / f'checkpoint-{finished}'}. The same command with --resume latest goes on."
                    )
        if self.ema is not None:
            self.ema.copy_to(list(self.parameters.values()))
        return line

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name; every process must call this, whole ones reach the main process only."""
        return sharding.whole(self.parameters, keep=self.accelerator.is_main_process)

    def _optimizer_step(self, step: int, indices: list[int], asked: Asked) -> bool:
        """Accumulate the gradient of the mean loss over the global batch, check it, clip it, and move.

        Return whether any process was asked to stop.
        """
        factor = optimizer.learning_rate_factor(self.optimizer, step, self.train.max_train_steps)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = self.peak * factor
        if self.has_dropout:
            ranks = self.accelerator.num_processes
            torch.manual_seed((self.train.seed * 1_000_003 + step) * ranks + self.accelerator.process_index)
        losses = []
        micro_batches = self.plan.micro_batches(indices, self.accelerator.process_index)
        for hook in self.hooks.values():
            hook.before_step([index for micro in micro_batches for index in micro], step)
        for micro in micro_batches:
            with self.accelerator.accumulate(self.network):
                loss, metrics = self._micro_step(micro, step)
            losses.append(loss)
            self.metrics.add(metrics)
        parameters = list(self.parameters.values())
        norm = sharding.clip(self.accelerator, self.torch_optimizer, parameters, self.optimizer.max_grad_norm)
        stopping = self._require_finite(step, indices, torch.cat(losses), norm, asked)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad(set_to_none=self.static is None)
        if self.ema is not None:
            self.ema.step(list(self.parameters.values()))
        for hook in self.hooks.values():
            hook.after_step(step)
        self.metrics.add(
            {"grad_norm": norm.detach(), "learning_rate": torch.tensor(self.peak * factor).to(norm.device)}
        )
        return stopping

    def _micro_step(self, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of some examples' share in the mean loss; return their losses [B] and metrics, detached."""
        if self.static is not None:
            return self.static(self.network, indices, step)
        loss, metrics = self.loss(self.network, indices, step)
        # accelerate divides by the accumulation steps, DDP averages over ranks: the mean of the global batch.
        self.accelerator.backward(loss.mean())
        return loss.detach(), metrics

    def _require_finite(self, step: int, indices: list[int], losses: Tensor, norm: Tensor, asked: Asked) -> bool:
        """Stop before a step that would ruin the weights; float16 gradients may overflow, its scaler skips those.

        Return whether any process was asked to stop: told along, so that it costs no message of its own.
        """
        scaled = self.accelerator.mixed_precision == "fp16"
        finite = torch.isfinite(losses.sum() if scaled else losses.sum() + norm).float()
        both = torch.stack([finite, torch.full_like(finite, float(bool(asked)))])
        finite, stopping = self.accelerator.reduce(both, reduction="mean").tolist()
        if finite == 1:
            return stopping > 0
        report = self.output_dir / f"nonfinite-step-{step}-rank-{self.accelerator.process_index}.json"
        mine = [i for micro in self.plan.micro_batches(indices, self.accelerator.process_index) for i in micro]
        rows = [{"index": i, "loss": str(loss)} for i, loss in zip(mine, losses.tolist(), strict=True)]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"step": step, "grad_norm": str(norm.item()), "pairs": rows}, indent=1))
        bad = [row["index"] for row in rows if not math.isfinite(float(row["loss"]))]
        raise NonFiniteLoss(
            f"Step {step}: the {'loss of pairs ' + str(bad[:8]) if bad else 'gradient'} is not finite. No step was "
            f"taken; the batch is listed in {report}. Lower optimizer.learning_rate, or use train.mixed_precision=bf16 "
            "or no."
        )

    def _resume(self) -> int:
        """Restore the checkpoint that was asked for, if there is one; return the number of finished steps."""
        wanted = self.train.resume_from_checkpoint
        if wanted and self.accelerator.is_main_process:
            for note in checkpoints.verify(self.output_dir, wanted):
                self.console.print(note, markup=False, highlight=False, soft_wrap=True)
        self.accelerator.wait_for_everyone()
        path = checkpoints.find(self.output_dir, wanted) if wanted else None
        step = 0 if path is None else self._restore(path)
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise checkpoint.CheckpointError(
                f"The processes found checkpoints of different steps: {steps}. train.output_dir {self.output_dir} must "
                "be on a file system that all machines share."
            )
        if path is None and self.accelerator.is_main_process:
            for note in checkpoints.set_aside(self.output_dir):
                self.console.print(note)
        return step

    def _restore(self, path: Path) -> int:
        step, state = checkpoint.load(path, self.parameters, self.identity, self.weights_file)
        checkpoint.require_steps_left(path, step, self.train.max_train_steps)
        if not state["optimizer"].keys() <= self.parameters.keys():
            raise checkpoint.CheckpointError(
                f"{path} keeps its optimizer state by number, as diffalign did before 2026-11-21, and not by the names "
                "of the weights. Continue it with that version, or start afresh in another train.output_dir."
            )
        optimizer.load_named_state(self.torch_optimizer, self.parameters, state["optimizer"])
        if self.ema is not None:
            averages = zip(state["ema"].pop("shadow_params"), self.parameters.values(), strict=True)
            self.ema.load_state_dict(state["ema"])
            self.ema.shadow_params = [sharding.cut(average, parameter) for average, parameter in averages]
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, hook in self.hooks.items():
            hook.load_state_dict(state["hooks"][name])
        self.metrics.load_state_dict(state.get("metrics", {}), self.accelerator.device)
        self.console.print(f"Resuming from {path} at step {step}.")
        return step

    def _save(self, step: int) -> None:
        """Collect on every process what may be sharded, and write it on the main one."""
        state: dict[str, Any] = {"optimizer": optimizer.named_state(self.torch_optimizer, self.parameters)}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        state = sharding.whole(state, keep=self.accelerator.is_main_process)
        state["metrics"] = self.metrics.state_dict(self.accelerator)
        weights = self.weights()
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            state["hooks"] = {name: hook.state_dict() for name, hook in self.hooks.items()}
            limit = self.train.checkpoints_total_limit
            checkpoint.save(self.output_dir, step, weights, state, self.identity, limit, self.weights_file)
        self.accelerator.wait_for_everyone()

    def _progress(self, done: int) -> Progress:
        return Progress(
            "step",
            self.train.max_train_steps,
            done=done,
            rate=False,  # the notes say pairs
            only_notes=True,
            enabled=self.accelerator.is_main_process,
            console=self.console,
        )


def _note(line: dict[str, float]) -> str:
    """Word the metrics people watch."""
    parts = [f"loss {line['loss']:.4f}"]
    if "implicit_accuracy" in line:
        parts.append(f"accuracy {line['implicit_accuracy']:.2f}")
    return "  ".join([*parts, f"{line['pairs_per_second']:.1f} pairs/s"])
