"""Which cards a run fits: how few bits the base needs on each, and how many examples a device then takes."""

from collections.abc import Iterator

from diffalign.config import Config
from diffalign.jobs.training import memory
from diffalign.vocabulary import QUANTIZATIONS

CARDS = (12, 16, 24, 48, 80)  # GiB
RECOMPUTED = {"none": "nothing", "selective": "norms and activations", "full": "everything"}


def rows(config: Config, counts: memory.Counts, unit: str) -> Iterator[tuple[str, str]]:
    """Yield a line of the dry run for each size of card, after one that says what they mean; none of unknown models."""
    if memory.largest_batch(config, counts, "full", CARDS[-1]) is None:
        return
    levels = ", ".join(RECOMPUTED.values())
    yield "cards", f"model.quantization: {unit} a device with {levels} recomputed, by the same estimate"
    for size in CARDS:
        kind = needed(config, counts, size)
        yield f"  {size} GiB", "does not fit" if kind is None else _described(quantized(config, kind), counts, size)


def _described(config: Config, counts: memory.Counts, available: float) -> str:
    """Word what of a run fits into `available` GiB, and which of its encoders' uses do not."""
    numbers = ", ".join(str(memory.largest_batch(config, counts, kind, available)) for kind in memory.KINDS)
    return "; ".join([f"{config.model.quantization}: {numbers}", *encoder_faults(config, counts, available)])


def encoder_faults(config: Config, counts: memory.Counts, available: float) -> Iterator[str]:
    """Yield in words for what the encoders are too large in `available` GiB."""
    if not counts.encoders_fit(available):
        yield "too small for the encoders: build the cache on a larger card or a CPU"
    if not memory.grids_fit(config, counts, available):
        yield "too small for the encoders beside the model: set validation.validation_steps: null"


def needed(config: Config, counts: memory.Counts, available: float) -> str | None:
    """Return how few bits the base needs for one example to fit into `available` GiB; None if none are few enough."""
    for kind in _possible(config):
        if memory.largest_batch(quantized(config, kind), counts, "full", available):
            return kind
    return None


def quantized(config: Config, kind: str) -> Config:
    """Return a configuration with another `model.quantization`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"quantization": kind})})


def _possible(config: Config) -> tuple[str, ...]:
    """Return the quantisations that a run could have, from the one that it has to the smallest."""
    if config.model.tune == "full" or config.performance.reference_dtype == "fp8":
        return ("none",)
    return QUANTIZATIONS[QUANTIZATIONS.index(config.model.quantization) :]


def remedy(config: Config, counts: memory.Counts, available: float) -> str:
    """Word what would make a run fit that does not, if anything known would."""
    best = memory.largest_batch(config, counts, "full", available)
    if best and best >= config.train.train_batch_size:
        return ": set train.gradient_checkpointing: auto"
    if best:
        return f": lower train.train_batch_size to {best}"
    kind = needed(config, counts, available)
    return f": set model.quantization: {kind} (docs/quantization.md)" if kind else ""
