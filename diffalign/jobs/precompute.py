"""`diffalign precompute`: fill the latent cache of a configuration."""

from accelerate import Accelerator
from rich.console import Console

from diffalign.config import Config
from diffalign.errors import ConfigError
from diffalign.jobs import assemble, examples


def precompute(config: Config, console: Console) -> None:
    """Encode the data of a run; print where the cache is and what it holds.

    Raises:
        ConfigError: the configuration does not use a cache.
    """
    if config.is_online:
        raise ConfigError(
            f'There is nothing to precompute: "{config.objective_name}" draws its images while it trains.'
        )
    if not config.data.cache_latents:
        raise ConfigError("There is nothing to precompute: data.cache_latents is false.")
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    backbone = assemble.load_backbone(config, accelerator.mixed_precision)
    source = examples.open_source(config)
    cache = examples.open_encoded(config, backbone, source, accelerator)
    size = sum(file.stat().st_size for file in cache.folder.iterdir()) / 2**20
    console.print(f"{source.counts}\n{cache.folder}: {len(cache)} examples, {size:.1f} MiB")
