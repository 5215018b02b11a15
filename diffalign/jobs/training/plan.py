"""`diffalign train --dry-run`: what a run would do and whether it fits, without loading weights or a network."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from diffalign import config as configuration
from diffalign.config import Config
from diffalign.config.changes import dump_changed
from diffalign.denoising import INVERSIONS, STABLE_DIFFUSION, DDPMPath, inversion
from diffalign.errors import UserError
from diffalign.jobs.training import (
    assemble,
    cards,
    long_captions,
    memory,
    meta_model,
    online_costs,
    preflight,
    storage,
    survey,
)
from diffalign.objectives.base import UNITS
from diffalign.places import is_hub_id
from diffalign.training import optimizer
from diffalign.training.batching import BatchPlan

NO = "does not fit"
WIDTH = 18  # of the names of lines
THOUSAND = 1000


def dry_run(
    config: Config, console: Console, gpu_memory: float | None = None, full: bool = False, *, overwrite: bool = False
) -> None:
    """Print what a run would do and what stands in its way.

    Args:
        config: of the run.
        console: where to print.
        gpu_memory: of the GPU it is planned for, GiB; None: of this machine's, if it has one.
        full: print all keys of the configuration, not only those that differ from their defaults.
        overwrite: the run may take the place of an earlier one.

    Raises:
        UserError: what would stop the run, all of it.
    """
    found = preflight.examine(config, overwrite=overwrite)
    show(config, found, console, gpu_memory, full)
    found.require()


def show(
    config: Config,
    found: preflight.Findings,
    console: Console,
    gpu_memory: float | None = None,
    full: bool = False,
) -> None:
    """Print the summary of a run that was examined, then its configuration."""
    rows = list(Plan(config, found, gpu_memory).rows())
    if console.is_terminal:
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows:
            table.add_row(Text(name, style="bold"), Text(value, style="red" if value.startswith(NO) else ""))
        console.print(table)
    else:  # a line each, for grep and for logs
        for name, value in rows:
            console.print(f"{name:<{WIDTH}}{value}", markup=False, highlight=False, soft_wrap=True)
    what = "Configuration" if full else "Keys that differ from their defaults (--full prints all)"
    console.print(f"\n{what}:", highlight=False)
    text = configuration.dump(config) if full else dump_changed(config)
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Plan:
    """Work out the summary of a run, as far as its faults allow."""

    config: Config
    found: preflight.Findings
    gpu_memory: float | None = None

    @cached_property
    def batch(self) -> BatchPlan:
        """Return the batch arithmetic; of a global batch that cannot be divided, that of a single micro-batch."""
        try:
            return BatchPlan.of(self.config.train, preflight.world_size())
        except UserError:
            return BatchPlan(self.config.train.train_batch_size, 1, preflight.world_size())

    @cached_property
    def model(self) -> meta_model.MetaModel | None:
        """Return the model without its weights, None if there is none."""
        try:
            return meta_model.read(self.config)
        except UserError:
            return None

    @cached_property
    def counts(self) -> memory.Counts | None:
        """Return how large the model is."""
        if self.model is None:
            return None
        denoiser, encoders = self.model.denoiser, meta_model.encoder_bytes(self.config, self.model)
        return memory.Counts(self.model.family, denoiser, *meta_model.count(self.config, denoiser), encoders)

    @cached_property
    def available(self) -> float | None:
        """Return the memory of the GPU that is planned for, GiB."""
        return self.gpu_memory or memory.device_memory()

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the lines of the summary."""
        config, unit = self.config, UNITS[self.config.build_objective().layout]
        yield "objective", repr(config.build_objective())
        yield "data", self._data()
        if self.found.source is not None:
            looked = survey.survey(self.found.source, config.data.resolution)
            yield "images", "none can be opened" if looked is None else looked.describe(config.data.resolution)
        if self.model is not None:
            texts = self.found.prompts or (self._content and self._content.texts)
            yield from long_captions.rows(config, self.model, texts)
        yield "batch", self.batch.describe(unit)
        yield f"{unit} seen", self._seen(unit)
        yield "network passes", passes(config)
        if self.model is not None and (drawn := meta_model.timesteps(config, self.model)):
            yield "timesteps", drawn
        rate = optimizer.peak_learning_rate(config.optimizer, self.batch.global_batch_size)
        yield "learning rate", f"{rate:.4g} after {config.optimizer.lr_warmup_steps} warm-up steps"
        if self.counts is not None:
            total, trained = self.counts.total, self.counts.trained
            yield "model", f"{self.model.family}, {total:,} parameters ({self.model.origin})"
            yield "trained", f"{trained:,} parameters ({trained / total:.2%})"
            yield from self._memory_rows(unit)
        yield from self._storage_rows()
        for note in self.found.notes:
            yield "note", note
        yield "verdict", self._verdict()

    def _data(self) -> str:
        data, source = self.config.data, self.found.source
        if self.found.prompts is not None:
            return f"{data.prompts_file}: {len(self.found.prompts):,} prompts"
        if source is not None:
            return f"{source.name}: {source.counts}"
        name = data.prompts_file or data.train_data_dir or data.dataset_name
        if data.prompts_file is not None or not is_hub_id(name):
            return f"{name}: cannot be read"
        limit = f", the first {data.max_train_samples:,}" if data.max_train_samples else ""
        named = "" if data.dataset_config_name is None else f", configuration {data.dataset_config_name}"
        return f"{name} on the hub{named}, split {data.dataset_split_name}{limit}"

    def _seen(self, unit: str) -> str:
        """Word how often each example is seen."""
        config = self.config
        seen = self.batch.global_batch_size * config.train.max_train_steps
        text = f"{config.train.max_train_steps:,} steps of {self.batch.global_batch_size:,} = {seen:,}"
        source, prompts = self.found.source, self.found.prompts
        if prompts is not None:
            drawn = seen / (config.rollout.transitions_per_prompt or online_costs.examples_per_prompt(config))
            return f"{text}, of {drawn:,.0f} rollouts: {drawn / len(prompts):.3g} epochs of {len(prompts):,} prompts"
        count = len(source) if source is not None else config.data.max_train_samples
        if count is None:
            return text
        if source is not None and unit == "images" and source.images_per_example == 2:
            return f"{text}: {seen / (2 * count):.3g} epochs of the images of {count:,} pairs, more where images repeat"
        return f"{text}: {seen / count:.3g} epochs of {count:,}"

    def _memory_rows(self, unit: str) -> Iterator[tuple[str, str]]:
        checkpointing = memory.checkpointing(self.config, self.batch, self.counts, self.available)
        yield "memory", memory.describe(memory.estimate(self.config, self.batch, self.counts, checkpointing.kind))
        yield "checkpointing", checkpointing.why
        if self.counts.encoders:
            taken = storage.amount(self.counts.encoders)
            yield (
                "encoders",
                f"{taken} of the device while pictures and prompts are encoded, before training{self._stay}",
            )
        yield from cards.rows(self.config, self.counts, unit)
        if self.available is None:
            return
        largest = {k: memory.largest_batch(self.config, self.counts, k, self.available) for k in memory.KINDS}
        if largest["none"] is not None:
            listed = ", ".join(f"{count} with {cards.RECOMPUTED[kind]} recomputed" for kind, count in largest.items())
            yield "largest batch", f"in {self.available:.4g} GiB, {unit} a device: {listed}{self._divisor(largest)}"

    @property
    def _stay(self) -> str:
        """Word when the encoders are on the device after that."""
        if not self.config.data.cache_latents or self.config.is_online:
            return ", and stay there"
        return "" if self.config.validation.validation_steps is None else ", and for validation grids"

    def _divisor(self, largest: dict[memory.Kind, int]) -> str:
        """Word which batch size also divides train.global_batch_size, if that is set."""
        wanted = self.config.train.global_batch_size
        if wanted is None:
            return ""
        share = wanted // preflight.world_size()
        fitting = [n for n in range(1, max(largest.values()) + 1) if share % n == 0]
        return f"; {fitting[-1]} is the largest that divides {wanted}" if fitting else ""

    def _storage_rows(self) -> Iterator[tuple[str, str]]:
        for write in self._writes:
            there = f"; {storage.amount(min(write.there, write.size))} of them are there" if write.there else ""
            if write.there == float("inf"):
                there = "; they are there, if the same weights made them"
            yield "disk", f"{storage.amount(write.size)} in {write.folder}: {write.what}{there}"
        if self._content is None and self.model is not None and not (self.config.is_online or self._uncut):
            pairs = storage.Content(THOUSAND, self._images, THOUSAND)
            each = storage.latent_cache(self.config, self.model, pairs)
            yield "disk", f"{storage.amount(each.size)} in {each.folder} for {THOUSAND:,} examples at most: {each.what}"
        free = {write.folder: storage.amount(storage.free(write.folder)) for write in self._writes}
        if free:
            yield "free", ", ".join(f"{size} in {folder}" for folder, size in free.items())
        for download in self._downloads:
            yield "download", f"{download.what}: {storage.amount(download.size) if download.size else 'unknown size'}"

    @cached_property
    def _downloads(self) -> list[storage.Download]:
        try:
            return storage.downloads(self.config)
        except UserError:  # of a judge that does not exist, which is said elsewhere
            return []

    @cached_property
    def _content(self) -> storage.Content | None:
        """Return how much data there is; of data on the hub, as much as may be used of it."""
        if self.found.source is not None:
            return storage.Content.of(self.found.source)
        limit = self.config.data.max_train_samples
        if self.config.is_online or limit is None:
            return None
        return storage.Content(limit, self._images, limit)

    @property
    def _images(self) -> int:
        """Return how many images an example of data that is not here is taken to have."""
        layout = self.config.build_objective().layout
        return memory.IMAGES[layout] if layout == "list" else 2

    @property
    def _uncut(self) -> bool:
        """Tell whether images cannot be cut to the resolution, so that nothing is cached."""
        return bool(self.config.data.resolution % 8)

    @cached_property
    def _writes(self) -> list[storage.Write]:
        config, data = self.config, self._content
        writes: list[storage.Write | None] = []
        if data is not None and self.model is not None and config.data.cache_latents and not self._uncut:
            writes = [storage.latent_cache(config, self.model, data), storage.reference_cache(config, data)]
        if self.counts is not None:
            writes.append(storage.checkpoints(config, self.counts.trained))
        return [write for write in writes if write is not None]

    def _verdict(self) -> str:
        """Answer whether the run fits into the memory of a GPU and onto the disks."""
        faults = list(self._memory_faults())
        needs = [(write.folder, write.missing) for write in self._writes]
        hub = Path(storage.hub_cache())
        faults += storage.shortages([*needs, *((hub, download.size or 0) for download in self._downloads)])
        answer = f"{NO}: {'; '.join(faults)}" if faults else f"fits{self._unknown()}"
        wrong = len(self.found.faults)
        return answer if not wrong else f"{answer}. It would not start: {wrong} fault{'s' * (wrong > 1)}, listed below"

    def _memory_faults(self) -> Iterator[str]:
        if self.counts is None or self.available is None:
            return
        kind = memory.checkpointing(self.config, self.batch, self.counts, self.available).kind
        needed, room = memory.estimate(self.config, self.batch, self.counts, kind), memory.HEADROOM * self.available
        if needed.total > room:
            advice = cards.remedy(self.config, self.counts, self.available)
            yield f"about {needed.total:.1f} GiB of the {room:.1f} GiB that a step may take{advice}"
        yield from cards.encoder_faults(self.config, self.counts, self.available)

    def _unknown(self) -> str:
        """Word what the verdict leaves out."""
        left_out = []
        if self.counts is None:
            left_out.append("the model, which cannot be read")
        elif self.available is None:
            left_out.append("memory: there is no GPU here, and --gpu-memory GIB names none")
        elif memory.largest_batch(self.config, self.counts, "none", self.available) is None:
            left_out.append("activations, not estimated for this size of model")
        if not self.config.is_online and self._content is None:
            left_out.append("caches of data that is not here yet")
        if any(download.size is None for download in self._downloads):
            left_out.append("downloads of unknown size")
        return f", leaving out {'; '.join(left_out)}" if left_out else ""


def passes(config: Config) -> str:
    """Word how many images pass through the network for one example, the cost of a method."""
    objective = config.build_objective()
    if config.is_online:
        return online_costs.passes(config)
    images, mismatched = memory.IMAGES[objective.layout], 2 if "mismatched" in objective.needs else 0
    frozen = float(images * (("reference" in objective.needs) + mismatched))
    note = f" (lists counted as {images} images)" if objective.layout == "list" else ""
    if config.reference.cache_draws is not None:
        note += f", once the reference's {images} of each of {config.reference.cache_draws} draws are kept"
        frozen -= images
    if config.noising in INVERSIONS:
        how, path = assemble.inversion(config), DDPMPath.from_config(STABLE_DIFFUSION)
        low, high = config.denoising.timestep_low, config.denoising.timestep_high or path.num_train_timesteps
        steps = inversion.plan(path, torch.arange(low, high), how).count.double().mean().item()
        frozen += images * steps * (1 + how.renoise_iterations)
        note += f", of them {frozen - images:.1f} for the inversion"
    return f"{images} images with gradient and {frozen:.3g} without per example{note}"
