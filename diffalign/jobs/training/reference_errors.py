"""The cache of the reference's errors of a run: what it depends on, and filling it before training."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.data import AnnotatedPairs, UnpairedImages
from diffalign.data.fingerprints import digest_bytes
from diffalign.errors import ConfigError
from diffalign.jobs.training import assemble, networks
from diffalign.jobs.training.examples import SizedExamples
from diffalign.progress import progress_bar
from diffalign.training import sharding
from diffalign.training.reference_cache import ReferenceCache

# A pass without gradient keeps so little that several training batches fit where one with gradient does.
PASS = 4


def open_stored(
    config: Config, backbone: Backbone, examples: SizedExamples, accelerator: Accelerator, console: Console
) -> ReferenceCache | None:
    """Open the errors of a run's reference, None if it keeps none. The denoiser must be as it was loaded.

    Raises:
        ConfigError: the run is sharded and errors are missing: only all processes together could run the reference, and
            each misses errors at other steps.
    """
    if config.reference.cache_draws is None:
        return None
    shape = config.reference.cache_draws, len(examples), examples.images_per_example
    stored = ReferenceCache.open(config.data.cache_dir, identity(config, backbone, examples), shape, console.print)
    if sharding.wanted(accelerator) and not stored.complete:
        raise ConfigError(
            "With FSDP, reference.cache_draws needs all errors of the reference before training. Compute them first, "
            "launched without FSDP: diffalign precompute CONFIG"
        )
    return stored


def identity(config: Config, backbone: Backbone, examples: SizedExamples) -> dict[str, Any]:
    """Return what the errors of a reference depend on.

    Neither objective, learning rate, LoRA nor min-SNR weights: runs that differ in these share one cache.
    """
    swapped = examples.swapped if isinstance(examples, AnnotatedPairs) else np.zeros(0, dtype=bool)
    pairs = examples.pairs if isinstance(examples, AnnotatedPairs) else examples
    latents = pairs.cache if isinstance(pairs, UnpairedImages) else pairs
    denoising, path = config.denoising, backbone.path
    return {
        "latents": latents.folder.name,
        "examples": digest_bytes(examples.example_ids.tobytes() + swapped.tobytes()).hex(),
        "denoiser": backbone.denoiser_fingerprint(),
        **networks.base_identity(config),
        "schedule": digest_bytes(path.identity()).hex(),
        **assemble.sampling_identity(config, backbone),
        "seed": config.train.seed,
        "noising": config.noising,
        "timesteps": [denoising.timestep_low, denoising.timestep_high or path.num_train_timesteps],
        "random_flip": config.data.random_flip,
        "proportion_empty_prompts": config.data.proportion_empty_prompts,
        "precision": [config.train.mixed_precision, config.pure_bf16, config.performance.reference_dtype],
    }


def fill(
    config: Config, backbone: Backbone, examples: SizedExamples, accelerator: Accelerator, console: Console
) -> None:
    """Compute all errors of the reference that are not known yet, each process its share; print where they are."""
    stored = open_stored(config, backbone, examples, accelerator, console)
    assert stored is not None, "called only where errors are kept"
    # The very networks that a run would train with: then the first logits are 0.
    reference = networks.prepare_networks(config, backbone, accelerator)
    accelerator.prepare_model(backbone.denoiser, evaluation_mode=True)
    step = assemble.preference_step(config, backbone, examples, reference, stored=stored)
    mine = stored.unknown()[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # or a slower process would divide what a faster one has left
    size = PASS * config.train.train_batch_size
    with progress_bar(len(mine), "reference errors", accelerator.is_main_process, console) as advance:
        for start in range(0, len(mine), size):
            step.fill(mine[start : start + size])
            advance(len(mine[start : start + size]))
    accelerator.wait_for_everyone()
    draws, count, images = stored.shape
    size = 4 * draws * count * images / 2**20
    console.print(f"{stored.folder}: {count} examples of {images} image(s) at {draws} draws, {size:.1f} MiB")
