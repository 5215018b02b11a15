"""The training data of a run: where it is read, how it is cached, judged and ordered."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from accelerate import Accelerator
from rich.console import Console

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.data import (
    AnnotatedPairs,
    Annotations,
    ClassRatioSampler,
    CurriculumSampler,
    LatentCache,
    OnlinePairs,
    PairSampler,
    PairSource,
    PairTransform,
    UnpairedImages,
    open_pairs,
)
from diffalign.data.cache_store import exclusive
from diffalign.data.visits import DistinctDraws
from diffalign.denoising import GENERATING, require_noises
from diffalign.errors import ConfigError
from diffalign.jobs.scoring import score
from diffalign.jobs.scoring import scorers as scoring
from diffalign.jobs.training import networks
from diffalign.training.preference_step import Examples
from diffalign.training.trainer import Sampler

FEW = 4096  # examples


class SizedExamples(Examples, Protocol):
    """Serve training examples and say how many there are, of how many images each."""

    images_per_example: int

    def __len__(self) -> int: ...


def open_source(config: Config, error_log: Path | None = None) -> PairSource:
    """Open the preference data of a run."""
    data = config.data
    return open_pairs(
        data.dataset_name or data.train_data_dir,
        root=data.root,
        split=data.dataset_split_name,
        config_name=data.dataset_config_name,
        format=data.format,
        image_columns=data.image_columns,
        label_columns=data.label_columns,
        caption_column=data.caption_column,
        image_caption_columns=data.image_caption_columns,
        list_labels=data.list_labels,
        max_samples=data.max_train_samples,
        on_error=data.on_error,
        error_log=error_log,
    )


def open_examples(
    config: Config, backbone: Backbone, source: PairSource, accelerator: Accelerator, console: Console
) -> SizedExamples:
    """Open the examples of a run as its objective wants them: pairs, lists or single images, judged as configured.

    Raises:
        ConfigError: the data has another form than the objective needs.
    """
    drawn = config.noising == GENERATING
    shape = backbone.latent_shape(config.data.resolution)
    if drawn and source.has_noises:
        require_noises(source[0].noises, shape, source.name)  # before hours of encoding
    encoded = open_encoded(config, backbone, source, accelerator)
    check(config, source.name, encoded.images_per_example, encoded.has_preference, source.has_noises)
    if drawn and isinstance(encoded, LatentCache):
        require_noises(encoded.noises, shape, source.name)
    examples = annotated(config, encoded, source, console)
    return taken_apart(config, examples) if takes_apart(config, examples.images_per_example) else examples


def takes_apart(config: Config, images: int) -> bool:
    """Tell whether the objective learns from the images of pairs one by one."""
    objective = config.build_objective()
    return objective.layout == "single" and not objective.chosen_only and images == 2


def check(config: Config, name: str, images: int, has_preference: bool, has_noises: bool) -> None:
    """Refuse data of another form than the configuration needs.

    Args:
        config: of the run.
        name: of the data.
        images: an example has.
        has_preference: whether some examples have P(winner preferred) by themselves.
        has_noises: whether it says what the images were drawn from.

    Raises:
        ConfigError: such data, with what to use instead.
        DataError: data that does not say what its pictures were drawn from, where that is needed.
    """
    data, objective = config.data, config.build_objective()
    if images != 2 and (data.annotations_file or data.scorer is not None or data.flip_labels):
        raise ConfigError(
            f"Scores, weights and flipped labels are for pairs; {name} has {images} "
            "image(s) an example. Clear data.scorer, data.annotations_file and data.flip_labels."
        )
    wanted = {"pair": (2,), "list": range(2, 1000), "single": range(2, 1000) if objective.chosen_only else (1, 2)}
    if images not in wanted[objective.layout]:
        need = {"pair": "pairs", "list": "ranked lists or pairs", "single": "labelled single images or pairs"}
        raise ConfigError(
            f'"{config.objective_name}" learns from {need[objective.layout]}; {name} has {images} image(s) an '
            "example. Choose another objective.name or data (docs/data-formats.md)."
        )
    soft = data.preference_from == "scores" or (has_preference and data.label_source != "reward")
    if "preference" in objective.needs and not soft:
        raise ConfigError(
            f'"{config.objective_name}" needs P(winner preferred), and {name} holds plain winners. Set '
            "data.preference_from: scores with data.scorer, e.g. data.scorer=pickscore."
        )
    if config.noising == GENERATING and not has_noises:
        require_noises(None, (), name)
    if takes_apart(config, images) and not data.cache_latents:
        raise ConfigError(
            f'"{config.objective_name}" takes pairs apart into single images, which needs data.cache_latents: true.'
        )


def taken_apart(config: Config, examples: SizedExamples) -> UnpairedImages:
    """Return the images of pairs one by one, labelled by whether they won."""
    swapped = examples.swapped if isinstance(examples, AnnotatedPairs) else None
    cache = examples.pairs if isinstance(examples, AnnotatedPairs) else examples
    assert isinstance(cache, LatentCache), "checked before"
    return UnpairedImages(cache, config.data.desirable, swapped=swapped)


def transform_of(config: Config) -> PairTransform:
    """Return how the images of a run are cut."""
    data = config.data
    return PairTransform(data.resolution, center_crop=not data.random_crop, random_flip=data.random_flip)


def open_encoded(
    config: Config, backbone: Backbone, source: PairSource, accelerator: Accelerator
) -> LatentCache | OnlinePairs:
    """Open the latent cache of a run, building what is missing of it, or encode online."""
    data = config.data
    transform = transform_of(config)
    backbone.offload_encoders(accelerator.device)
    if not data.cache_latents:
        return OnlinePairs(source, backbone, transform)
    # Every rank asks; one builds behind a file lock while the others wait there. A barrier would time out on real data.
    cache = LatentCache.build(
        source,
        backbone,
        transform,
        data.cache_dir,
        dtype=data.cache_dtype,
        text_dtype=text_dtype(config, type(backbone)),
        batch_size=data.vae_encode_batch_size,
        announce=accelerator.is_main_process,
    )
    backbone.offload_encoders("cpu")
    return cache


def text_dtype(config: Config, family: type[Backbone]) -> str:
    """Return the precision that encoded prompts are kept in.

    Where the denoiser's weights are in half precision, so are the encoders', and `predict` casts to it: kept like that,
    prompts are what they would be without a cache, to the bit. UNets keep what caches always held.
    """
    if config.data.cache_text_dtype is not None:
        return config.data.cache_text_dtype
    weights = networks.weights_dtype(config)
    if family.large_text and weights in networks.HALF.values():
        return str(weights).removeprefix("torch.")
    return config.data.cache_dtype


def annotated(
    config: Config, examples: LatentCache | OnlinePairs, source: PairSource, console: Console
) -> SizedExamples:
    """Lay scores, weights and changed labels over pairs, if any are wanted."""
    data = config.data
    file = Path(data.annotations_file) if data.annotations_file else None
    if file is None and data.scorer is not None:
        file = scores_file(config, source, console)
    if file is None and data.flip_labels == 0:
        return examples
    return AnnotatedPairs(
        examples,
        read_annotations(config, file) if file else None,
        preference_from=data.preference_from,
        score_range=tuple(data.score_range) if data.score_range else None,
        label_source=data.label_source,
        flip_labels=data.flip_labels,
        seed=config.train.seed,
    )


def read_annotations(config: Config, file: Path) -> Annotations:
    """Read the scores and weights of a run: of several scorers, those of data.scorer."""
    return Annotations.read(file, scorer_of(config))


def scorer_of(config: Config) -> str | None:
    """Return the name of data.scorer.

    Raises:
        ConfigError: it names several.
        UserError: it names none that exists.
    """
    if config.data.scorer is None:
        return None
    names = scoring.parse(config.data.scorer)
    if len(names) != 1:
        raise ConfigError(f"data.scorer must name one reward model, got {config.data.scorer!r}.")
    return scoring.name_of(next(iter(names)))


def scores_file(config: Config, source: PairSource, console: Console) -> Path:
    """Score all pairs with data.scorer and return the file; done once per data set, scorer and its weights."""
    directory = Path(config.data.cache_dir)
    memo = directory / "content_hashes.sqlite"
    weights = {name: scoring.weights_of(name, path, memo) for name, path in scoring.parse(config.data.scorer).items()}
    key = {"data": source.identify(memo), "scorer": weights}
    if own := scoring.sources(config.data.scorer):
        key["own_code"] = own
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = directory / f"scores-{digest}.parquet"
    with exclusive(directory / f"scores-{digest}"):  # every rank asks; one scores while the others wait
        if not file.exists():
            table: pd.DataFrame = score.score_source(source, scoring.load(config.data.scorer))
            console.print(score.agreement(table))
            partial = file.with_suffix(".partial")
            table.to_parquet(partial)
            partial.rename(file)
    return file


def order(config: Config, examples: SizedExamples, source: PairSource, global_batch_size: int) -> Sampler:
    """Return the order in which examples are drawn; one that comes again in a step is drawn for anew."""
    draws = config.reference.cache_draws
    return DistinctDraws(_order(config, examples, source, global_batch_size), same_examples(examples), draws)


def same_examples(examples: SizedExamples) -> np.ndarray | None:
    """Return what tells which examples [P] are the same, though they are listed apart; None where it costs too much."""
    # Not encoded beforehand, images would have to be read and hashed. Of many examples, two alike hardly ever meet.
    if isinstance(examples, OnlinePairs):
        few = len(examples) <= FEW and getattr(examples.source, "window", None) is None
        return examples.readable_ids() if few else None
    return examples.example_ids


def _order(config: Config, examples: SizedExamples, source: PairSource, global_batch_size: int) -> Sampler:
    data, seed = config.data, config.train.seed
    if data.positive_ratio is not None:
        return ClassRatioSampler(desirable_of(examples), data.positive_ratio, seed)
    if data.curriculum_stages is not None:
        margins = examples.scores[:, 0] - examples.scores[:, 1]
        return CurriculumSampler(margins, data.curriculum_stages, data.curriculum_steps * global_batch_size, seed)
    window = getattr(source, "window", None)
    return PairSampler(len(examples), seed, window=window, draws=config.reference.cache_draws)


def desirable_of(examples: Any) -> Any:
    """Return which single images are desirable, bool [P]."""
    return examples.desirable if isinstance(examples, UnpairedImages) else examples.scores[:, 0] > 0.5
