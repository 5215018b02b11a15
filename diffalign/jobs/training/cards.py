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
        fits = "does not fit" if kind is None else f"{kind}: {_numbers(quantized(config, kind), counts, size)}"
        yield f"  {size} GiB", fits + _without_encoders(counts, size)


def _numbers(config: Config, counts: memory.Counts, available: float) -> str:
    return ", ".join(str(memory.largest_batch(config, counts, kind, available)) for kind in memory.KINDS)


def _without_encoders(counts: memory.Counts, available: float) -> str:
    """Word that the encoders alone are too large for a card."""
    return "" if counts.encoders_fit(available) else "; its encoders do not: build the cache on a larger card or a CPU"


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
