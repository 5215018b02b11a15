"""Score images by how much people would like them: `load(name).score(images, prompts)`. Independent of diffalign."""

from reward_models.base import Scorer, ScorerCard, ScorerError
from reward_models.registry import card, convert, load, names

__all__ = ["Scorer", "ScorerCard", "ScorerError", "card", "convert", "load", "names"]
