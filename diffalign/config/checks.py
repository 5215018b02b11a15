"""Combinations of settings, each valid alone, that cannot work together."""

from diffalign.config.config import Config
from diffalign.denoising import INVERSIONS
from diffalign.errors import ConfigError


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible combination, saying what to change."""
    objective, name = config.build_objective(), config.objective_name
    referenced = "reference" in objective.needs
    faults = {
        f'"{name}" gives each image a caption of its own: name their columns in data.image_caption_columns, e.g. '
        "[caption_0, caption_1].": "image_captions" in objective.needs and config.data.image_caption_columns is None,
        f'reference.update "{config.reference.update}" needs an objective with a reference, "{name}" has none. Use '
        "fixed.": config.reference.update != "fixed" and not referenced,
        f'loss.anchor_weight needs an objective with a reference, "{name}" has none. Use 0.': (
            config.loss.anchor_weight > 0 and not referenced
        ),
        f'loss.auto_beta needs an objective of pairs with a reference and a beta, "{name}" is none. Use null.': (
            config.loss.auto_beta is not None
            and not (referenced and objective.layout == "pair" and hasattr(objective, "beta"))
        ),
        f'inversion.network "reference" needs an objective with a reference, "{name}" has none. Use policy.': (
            config.noising in INVERSIONS and config.inversion.network == "reference" and not referenced
        ),
        f'data.positive_ratio is for objectives of labelled single images (kto); "{name}" is none. Use null.': (
            config.data.positive_ratio is not None and (objective.layout != "single" or objective.chosen_only)
        ),
        "data.positive_ratio and data.curriculum_stages both decide which example comes next. Use one.": (
            config.data.positive_ratio is not None and config.data.curriculum_stages is not None
        ),
        f"loss.auto_beta_limits must be [low, high] with 0 < low <= high, got {config.loss.auto_beta_limits}.": (
            not 0 < config.loss.auto_beta_limits[0] <= config.loss.auto_beta_limits[1]
        ),
    }
    for message, found in faults.items():
        if found:
            raise ConfigError(message)
