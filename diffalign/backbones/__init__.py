"""Model families: load one, encode prompts and images, predict, decode, train adapters and export them."""

from diffalign.backbones.base import Backbone
from diffalign.backbones.conditioning import Conditioning
from diffalign.backbones.loading import load

__all__ = ["Backbone", "Conditioning", "load"]
