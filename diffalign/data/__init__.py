"""Preference pairs: readers, transforms, the latent cache, batches and their order."""

from diffalign.data.batch import Augment, Augmentation, PairBatch, PairEncoder, sample_latents
from diffalign.data.cache import LatentCache
from diffalign.data.online import OnlinePairs
from diffalign.data.pairs import ImageRef, PairRow, RowError
from diffalign.data.readers import open_pairs
from diffalign.data.sampler import PairSampler
from diffalign.data.source import Counts, PairSource
from diffalign.data.transforms import PairTransform

__all__ = [
    "Augment",
    "Augmentation",
    "Counts",
    "ImageRef",
    "LatentCache",
    "OnlinePairs",
    "PairBatch",
    "PairEncoder",
    "PairRow",
    "PairSampler",
    "PairSource",
    "PairTransform",
    "RowError",
    "open_pairs",
    "sample_latents",
]
