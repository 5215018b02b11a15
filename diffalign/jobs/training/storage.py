"""What a run writes to disk and downloads, worked out from shapes: nothing is written or asked of a network."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import reward_models
from diffalign.backbones import inspection, published
from diffalign.config import Config
from diffalign.data import PairSource
from diffalign.data.cache import META
from diffalign.data.cache_store import COMPLETE, read_json
from diffalign.data.shards import downloaded_snapshot
from diffalign.errors import ConfigError, UserError
from diffalign.jobs.scoring import scorers
from diffalign.jobs.training import examples, memory, meta_model, text_costs
from diffalign.jobs.training.meta_model import MetaModel
from diffalign.places import is_hub_id
from reward_models.base import UNPUBLISHED

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
PICKAPIC = 335e9  # of yuvalkirstain/pickapic_v2, as MaPO's README says; its split train is 645 files
HUB_DATA = {"yuvalkirstain/pickapic_v2": PICKAPIC}


@dataclass(frozen=True)
class Content:
    """Say how much data there is; `source` is None if it is not here yet."""

    examples: int
    images_per_example: int
    prompts: int  # distinct ones
    source: PairSource | None = None
    texts: Sequence[str] | None = None  # the distinct prompts

    @classmethod
    def of(cls, source: PairSource) -> Self:
        """Count a data set that is open."""
        texts = list(dict.fromkeys(source.captions()))
        return cls(len(source), source.images_per_example or 1, len(texts), source, texts)


@dataclass(frozen=True)
class Write:
    """Say what is written where; `there` bytes of it are already."""

    what: str
    folder: Path
    size: float  # bytes
    there: float = 0
    least: float = 0  # bytes that it takes for sure

    @property
    def missing(self) -> float:
        """Return how many bytes are yet to be written."""
        return max(self.size - self.there, 0)


@dataclass(frozen=True)
class Download:
    """Say what is downloaded; None where nobody knows how much."""

    what: str
    size: float | None


def amount(size: float) -> str:
    """Word a number of bytes."""
    power = 0
    while size >= 1000 and power < len(UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.0f} bytes" if power == 0 else f"{size:.3g} {UNITS[power]}"


def latent_cache(config: Config, model: MetaModel, data: Content) -> Write:
    """Return the cache of latents and prompts of a data set, all of whose images are distinct."""
    number, variants = text_costs.STORED_BYTES[config.data.cache_dtype], 2 if config.data.random_flip else 1
    side = config.data.resolution // model.vae_scale_factor
    image = variants * (2 * model.kind.latent_channels_of(model.denoiser.config) * side**2 * number + 6 * 4) + 16
    images, rows = data.examples * data.images_per_example, data.examples * (20 + 20 * data.images_per_example)
    text = text_costs.estimate(config, model, data.prompts, data.texts)
    what = (
        f"{amount(images * image)} latents of at most {images:,} images, {amount(image)} each, and "
        f"{amount(text.size)} text of {text.what}, {amount(text.each)} a {text.unit}"
    )
    there = 0.0 if data.source is None else _latents_there(config, model, data.source)
    least = data.examples * image + text.size + rows  # an image may be in many pairs, and is kept once
    return Write(what, Path(config.data.cache_dir), images * image + text.size + rows, there, least)


def check_room(config: Config, source: PairSource) -> Write | None:
    """Refuse to fill a cache of latents and prompts for which the disk has too little room; return what it takes.

    Counted are the prompts, and as images may repeat, one image of each example. None: nothing is cached, or how much
    is not known before.

    Raises:
        ConfigError: that is more than is free.
    """
    if not config.data.cache_latents or source.window:  # a stream is read once, and tells nothing before
        return None
    try:
        model = meta_model.read(config)
    except UserError:
        return None  # it is refused elsewhere
    cache = latent_cache(config, model, Content.of(source))
    if (needed := max(cache.least - cache.there, 0)) > (room := free(cache.folder)):
        raise ConfigError(
            f"The disk of data.cache_dir {cache.folder} has {amount(room)} free, and the cache takes at least "
            f"{amount(needed)}, up to {amount(cache.missing)} ({cache.what}). Make room, name another data.cache_dir, "
            "or encode at every step: data.cache_latents: false."
        )
    return cache


def _latents_there(config: Config, model: MetaModel, source: PairSource) -> float:
    """Return the bytes of the largest cache that was made of such data in this way.

    Whose weights encoded it is not known before they are loaded.
    """
    wanted, found = examples.transform_of(config).identity, [0.0]
    dtype, text_dtype = config.data.cache_dtype, examples.text_dtype(config, model.kind)
    for file in Path(config.data.cache_dir).glob(f"*/{META}"):
        fields = read_json(file) or {}
        same = fields.get("transform") == wanted and fields.get("dtype") == dtype
        same = same and fields.get("text_dtype", dtype) == text_dtype
        same = same and fields.get("token_columns", []) == text_costs.token_columns(config, model)
        if same and _resembles(fields.get("source", {}), source):
            size = sum(part.stat().st_size for part in file.parent.iterdir())
            found.append(float("inf") if (file.parent / COMPLETE).exists() else size)
    return max(found)


def _resembles(recorded: dict, source: PairSource) -> bool:
    """Tell whether a data set has the names and sizes of files that a cache was made of."""
    files = getattr(source, "files", None) or getattr(source, "lists", [])
    sizes = {file.name: file.stat().st_size for file in files}
    known = {file["name"]: file["bytes"] for file in recorded.get("files", [])}
    return recorded.get("pairs") == len(source) and sizes == known


def reference_cache(config: Config, data: Content) -> Write | None:
    """Return the cache of the reference's errors, if one is kept."""
    draws = config.reference.cache_draws
    if draws is None:
        return None
    shape = [draws, data.examples, data.images_per_example]
    there = 0.0
    for file in Path(config.data.cache_dir).glob("reference-*/identity.json"):
        fields = read_json(file) or {}
        same = fields.get("seed") == config.train.seed and fields.get("noising") == config.noising
        if same and fields.get("shape") == shape and (file.parent / "errors.npy").exists():
            there = float("inf")
    what = f"errors of the reference at {draws} draws"
    return Write(what, Path(config.data.cache_dir), 4.0 * math.prod(shape), there)


def checkpoints(config: Config, trained: int) -> Write:
    """Return the checkpoints that are there at a time at most, one more than are kept, and the export."""
    train = config.train
    number = -(-train.max_train_steps // train.checkpointing_steps)
    if train.checkpoints_total_limit is not None:
        number = min(number, train.checkpoints_total_limit + 1)
    average = 4 if config.optimizer.use_ema else 0
    each = trained * (4 + memory.STATE_BYTES[config.optimizer.name] + average)
    return Write(
        f"{number} checkpoints of {amount(each)} and the result", Path(train.output_dir), number * each + 4 * trained
    )


def downloads(config: Config) -> list[Download]:
    """Return what is on the hub and not in this machine's cache."""
    return [*_models(config), *_judges(config), *_data(config)]


def _models(config: Config) -> Iterator[Download]:
    model = config.model
    name, vae, unet = model.pretrained_model_name_or_path, model.pretrained_vae_model_name_or_path, model.unet_init
    if is_hub_id(name):
        parameters = published.PARAMETERS.get(published.MODELS.get(name, ""), {})
        named = inspection.transformer_family(name)
        denoiser = "unet" if named is None else named.denoiser_name
        replaced = {part for part, given in (("vae", vae), (denoiser, unet)) if given is not None}
        folders = [part for part in parameters or (denoiser,) if part not in replaced]
        if not _downloaded(name, model.revision, folders):
            known = sum(count for part, count in parameters.items() if part not in replaced)
            yield Download(name, known * (2 if model.variant == "fp16" else 4) or None)
    if vae is not None and is_hub_id(vae) and not _downloaded(vae, None, [""]):
        yield Download(vae, 4 * published.PARAMETERS["sdxl"]["vae"] if vae in published.VAES else None)
    if unet is not None and is_hub_id(unet) and not _downloaded(unet, None, [""]):
        yield Download(f"{unet} (no such folder here)", None)


def _downloaded(name: str, revision: str | None, folders: Iterable[str]) -> bool:
    snapshot = downloaded_snapshot(name, revision, "model")
    return snapshot is not None and all(any((snapshot / folder).rglob("*.safetensors")) for folder in folders)


def _judges(config: Config) -> Iterator[Download]:
    wanted = config.rollout.scorer if config.is_online else config.data.scorer
    if wanted is None or wanted.startswith(("labels=", "lrm=")) or config.data.annotations_file is not None:
        return
    for name, place in scorers.parse(wanted).items():
        if name in scorers.OWN:
            continue
        weights = place or reward_models.card(name).weights
        repository = "/".join(weights.split("/")[:2])
        if weights != UNPUBLISHED and is_hub_id(repository) and downloaded_snapshot(repository, None, "model") is None:
            yield Download(f"{name} ({weights})", None)


def _data(config: Config) -> Iterator[Download]:
    data = config.data
    name = data.dataset_name or data.train_data_dir
    if name is None or not is_hub_id(name) or downloaded_snapshot(name, None) is not None:
        return
    if data.max_train_samples is None:
        yield Download(f"{name}, all of it", HUB_DATA.get(name))
        yield Download(f"the copy of {name} that datasets makes to read it", HUB_DATA.get(name))
    else:
        what = f"{name}, split {data.dataset_split_name}: its first files, until {data.max_train_samples:,} examples"
        yield Download(f"{what} are there", None)


def hub_cache() -> str:
    """Return where downloads go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def free(folder: Path) -> int:
    """Return the free bytes where a folder is or will be."""
    return shutil.disk_usage(_existing(folder)).free


def shortages(needs: Iterable[tuple[Path, float]]) -> Iterator[str]:
    """Yield in words which disks are too small for all that is to be written to them."""
    by_disk: dict[int, tuple[Path, float]] = {}
    for folder, size in needs:
        disk = os.stat(_existing(folder)).st_dev
        first, total = by_disk.get(disk, (folder, 0.0))
        by_disk[disk] = first, total + size
    for folder, size in by_disk.values():
        if size > free(folder):
            yield f"the disk of {folder} has {amount(free(folder))} free, up to {amount(size)} are written to it"


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())
