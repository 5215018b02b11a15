"""FiFA's importance of a preference pair (Yang et al., ICLR 2025, arXiv:2410.10166).

    v_i = m_i + alpha * ( q_c + gamma * log(d_c + epsilon) )

m_i: margin of a proxy reward (margin.py). q_c: quality of the prompt as rated by a language model, divided by its scale
(text_quality.py). d_c: distance of the prompt's embedding to its k-th nearest neighbour (text_entropy.py). The K pairs
of highest importance are taken, which maximises, up to constants, mean margin + alpha * (mean quality + gamma *
entropy of the prompts) over sets of K pairs.

That there are these three terms and a score per pair is the paper's; the formula and every number below are a
reconstruction, because neither the paper's body nor its code could be read. Deviations of ours: normalisation, and a
margin with the sign of the label (docs/filtering.md, "Does it help?").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import ConfigError, suggestion
from diffalign.filtering.margin import MODES

NORMALISATIONS = ("zscore", "minmax", "none")
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings:
    """Hold the constants of the importance score. None is official; see docs/filtering.md."""

    alpha: float = 0.5  # weight of the text terms against the margin
    gamma: float = 0.5  # weight of log distance against text quality
    neighbours: int = 1  # k of the k-th nearest neighbour
    epsilon: float = 1e-6  # added to distances before the logarithm
    quality_scale: float = 10.0  # qualities are divided by it
    normalise: str = "zscore"  # of each component over the candidates, before weighting
    margin: str = "signed"  # or "absolute", as in the reconstruction: worse than chance where labels are wrong
    margin_cap: float | None = None  # larger margins count as this much
    require_agreement: bool = False  # leave out pairs whose label the scorer contradicts
    min_text_quality: float | None = None  # leave out prompts rated lower, on the scale of the ratings
    max_per_prompt: int | None = None  # pairs of one prompt at most

    def __post_init__(self):
        for name, allowed in (("normalise", NORMALISATIONS), ("margin", MODES)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f'Unknown {name} "{value}".{suggestion(value, allowed)} Use {", ".join(allowed)}.')
        for name in ("alpha", "gamma", "epsilon"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name, least in (("neighbours", 1), ("max_per_prompt", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        for name in ("quality_scale", "margin_cap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}.")

    @property
    def uses_entropy(self) -> bool:
        """Tell whether distances between prompts count at all."""
        return self.alpha > 0 and self.gamma > 0


def log_distance(distance: Array, settings: ImportanceSettings) -> Array:
    """Return log(d + epsilon) of distances to the k-th nearest neighbour."""
    with np.errstate(divide="ignore"):  # epsilon 0 leaves the logarithm of 0 to the user
        return np.log(distance + settings.epsilon)


def importance(
    margin: Array,
    quality: Array | None,
    distance: Array | None,
    prompt_of: NDArray[np.int64],
    settings: ImportanceSettings,
) -> Array:
    """Return v [N]; NaN where the margin is.

    Args:
        margin: m [N], NaN for pairs that cannot be chosen.
        quality: rating of each prompt [P], or None to leave the term out.
        distance: of each prompt to its k-th nearest neighbour [P], or None to leave the term out.
        prompt_of: the prompt of each pair [N].
        settings: the constants.
    """
    value = normalised(margin, settings.normalise)
    if quality is not None:
        value = value + settings.alpha * normalised(quality / settings.quality_scale, settings.normalise)[prompt_of]
    if distance is not None and settings.uses_entropy:
        spread = normalised(log_distance(distance, settings), settings.normalise)
        value = value + settings.alpha * settings.gamma * spread[prompt_of]
    return value


def normalised(values: Array, how: str) -> Array:
    """Return values with mean 0 and standard deviation 1 ("zscore"), in [0, 1] ("minmax") or as they are ("none").

    Statistics are over the values that are finite; constant values become 0.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if how == "none" or not len(finite):
        return values
    shift, scale = (finite.mean(), finite.std()) if how == "zscore" else (finite.min(), np.ptp(finite))
    # the spread of equal numbers can come out as a rounding error
    return (values - shift) / scale if scale > 1e-12 * np.abs(finite).max() else values * 0.0
