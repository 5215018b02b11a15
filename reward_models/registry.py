"""Scorers by name. The list is the files of this package: adding a scorer is adding a file."""

import difflib
import functools
import importlib
import os
import pkgutil
from pathlib import Path
from typing import Any

import torch

from reward_models.base import UNPUBLISHED, Scorer, ScorerCard, ScorerError


@functools.cache
def _classes() -> dict[str, tuple[type[Scorer], ScorerCard]]:
    package = __package__
    found = {}
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{entry.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Scorer) and value.__module__ == module.__name__:
                found.update({card.name: (value, card) for card in value.cards})
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Return the names `load` knows, sorted."""
    return list(_classes())


def card(name: str) -> ScorerCard:
    """Return what is known about a scorer without loading it; raise ScorerError for an unknown name."""
    return _find(name)[1]


def load(
    name: str,
    path_or_id: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Scorer:
    """Load a scorer once, for any number of calls.

    Args:
        name: one of `names()`. "hpsv2" and "hpsv2.1" differ by their weights only.
        path_or_id: a weights file, a folder or a Hugging Face id; the official weights when None.
        device: where the network runs.
        dtype: of the network; scores are computed in float32 from its embeddings on.
        options: what else `from_pretrained` of this scorer takes.

    Raises:
        ScorerError: for an unknown name, and for weights that are missing, unsafe, damaged or of other shapes.
    """
    scorer_class, scorer_card = _find(name)
    if path_or_id is None and scorer_card.weights == UNPUBLISHED:
        raise ScorerError(f"Nobody has published weights for {name}: give the path of your own.")
    path_or_id = scorer_card.weights if path_or_id is None else os.fspath(path_or_id)
    return scorer_class.from_pretrained(scorer_card, path_or_id, dtype=dtype, **options).to(device)


def convert(name: str, path_or_id: str | os.PathLike, directory: str | os.PathLike) -> Path:
    """Write weights in any form that `load` reads as a folder of safetensors, checked name by name; return it."""
    return load(name, path_or_id).save(directory)


def _find(name: str) -> tuple[type[Scorer], ScorerCard]:
    if name not in _classes():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ScorerError(f'Unknown scorer "{name}".{hint} Available: {", ".join(names())}.')
    return _classes()[name]
