"""`diffalign precompute`: fill the caches of a configuration."""

from pathlib import Path

from rich.console import Console

from diffalign.config import Config
from diffalign.errors import ConfigError
from diffalign.jobs import skipped
from diffalign.jobs.training import assemble, examples, long_captions, reference_errors, storage
from diffalign.jobs.training.train import make_accelerator


def precompute(config: Config, console: Console) -> None:
    """Encode the data of a run, and evaluate its reference if that is cached; print where it all is.

    Raises:
        ConfigError: the configuration does not use a cache.
    """
    if config.is_online:
        raise ConfigError(
            f'There is nothing to precompute: "{config.objective_name}" draws its images while it trains.'
        )
    if not config.data.cache_latents:
        raise ConfigError("There is nothing to precompute: data.cache_latents is false.")
    accelerator = make_accelerator(config)
    source = examples.open_source(config, Path(config.train.output_dir) / skipped.FILE)
    foretold = storage.check_room(config, source)
    if foretold is not None and foretold.missing:
        console.print(f"To be written: {storage.amount(foretold.missing)} ({foretold.what})")
    backbone = assemble.load_backbone(config)
    long_captions.tell(config, backbone, source, console)
    cache = examples.open_encoded(config, backbone, source, accelerator)
    size = sum(file.stat().st_size for file in cache.folder.iterdir()) / 2**20
    console.print(f"{source.counts}\n{cache.folder}: {len(cache)} examples, {size:.1f} MiB")
    skipped.tell(source.rejects, console)
    if config.reference.cache_draws is not None:
        data = examples.open_examples(config, backbone, source, accelerator, console)
        reference_errors.fill(config, backbone, data, accelerator, console)
