"""Align text-to-image diffusion models with human preferences: train, score, evaluate, show."""

__version__ = "0.1.0"
