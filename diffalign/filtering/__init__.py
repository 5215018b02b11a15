"""Choose which preference pairs to train on: FiFA's importance score, its components, and baselines.

One file a component: margin, text_quality (and language_model, one source of it), text_entropy. importance.py weighs
them, baselines.py offers other rankings, selection.py takes the best, cleaning.py dedupes and splits by prompt.
"""

from diffalign.filtering.baselines import METHODS, rank
from diffalign.filtering.importance import ImportanceSettings, importance
from diffalign.filtering.margin import margins, read_scores
from diffalign.filtering.selection import parse_keep, select
from diffalign.filtering.text_entropy import ClipTextEncoder, knn_entropy, nearest_distances
from diffalign.filtering.text_quality import Rating, rate, read_qualities

__all__ = [
    "METHODS",
    "ClipTextEncoder",
    "ImportanceSettings",
    "Rating",
    "importance",
    "knn_entropy",
    "margins",
    "nearest_distances",
    "parse_keep",
    "rank",
    "rate",
    "read_qualities",
    "read_scores",
    "select",
]
