"""Preferences over images: readers, transforms, the latent cache, batches and their order."""

from diffalign.data.annotated import AnnotatedPairs
from diffalign.data.annotations import Annotations
from diffalign.data.batch import Augment, Augmentation, PairEncoder, PreferenceBatch, sample_latents
from diffalign.data.cache import LatentCache
from diffalign.data.lists import win_rate_labels
from diffalign.data.online import OnlinePairs
from diffalign.data.pairs import Example, ImageRef, ListRow, PairRow, RowError
from diffalign.data.readers import open_pairs
from diffalign.data.rejects import Counts
from diffalign.data.sampler import ClassRatioSampler, CurriculumSampler, PairSampler
from diffalign.data.source import PairSource
from diffalign.data.transforms import PairTransform
from diffalign.data.unpaired import UnpairedImages

__all__ = [
    "AnnotatedPairs",
    "Annotations",
    "Augment",
    "Augmentation",
    "ClassRatioSampler",
    "Counts",
    "CurriculumSampler",
    "Example",
    "ImageRef",
    "LatentCache",
    "ListRow",
    "OnlinePairs",
    "PairEncoder",
    "PairRow",
    "PairSampler",
    "PairSource",
    "PairTransform",
    "PreferenceBatch",
    "RowError",
    "UnpairedImages",
    "open_pairs",
    "sample_latents",
    "win_rate_labels",
]
