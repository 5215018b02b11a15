"""Scorers of users' own: what a class must offer, and how it is built."""

import functools
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

import reward_models
from diffalign import plugins
from diffalign.errors import ConfigError
from diffalign.filtering.files import weights_identity
from reward_models.composite import read_recipe, recipe_file, resolved

COMPOSITE = "composite"  # the reward model that is made of others


@functools.cache
def find(address: str) -> type[Any]:
    """Return the scorer at an address: a class with `name` and `score`, or one that derives from reward_models.Scorer.

    Raises:
        ConfigError: it is none.
    """
    found = plugins.load(address).value
    if faults := list(_faults(found)):
        raise ConfigError(f"{address} is no scorer: {'; '.join(faults)}. See {plugins.PAGE}.")
    return found


def name_of(address: str) -> str:
    """Return what a scorer calls itself, in tables and figures."""
    found = find(address)
    return found.cards[0].name if _is_reward_model(found) else found.name


def reads_prompt(address: str) -> bool:
    """Tell whether a score depends on the prompt; a scorer that does not say so does."""
    found = find(address)
    return found.cards[0].text_length is not None if _is_reward_model(found) else getattr(found, "reads_prompt", True)


def build(address: str, weights: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a scorer and move it to a device, if it can be moved.

    Raises:
        ConfigError: weights that it does not take, or needs and does not get; or whatever it raises itself.
    """
    found, plugin = find(address), plugins.load(address)
    with plugins.told(f"{address} cannot be built", plugin.file.parent):
        if _is_reward_model(found):
            card = found.cards[0]
            scorer = found.from_pretrained(card, weights or card.weights, dtype=dtype)
        else:
            given = (weights,) if weights else ()
            if not _accepts(found, *given):
                wrong = "takes no weights: write it alone" if weights else f"needs weights: write {address}=WEIGHTS"
                raise ConfigError(f"{address} {wrong}.")
            scorer = found(*given)
        return scorer.to(device) if hasattr(scorer, "to") else scorer


def part(name: str, path: str | None, *, dtype: torch.dtype) -> reward_models.Scorer:
    """Load what a composite is made of: a reward model by name, or one of a user's own.

    Raises:
        ConfigError: a scorer that takes pictures: the parts of a composite share pixels.
    """
    address = plugins.address(name, plugins.SCORERS, reward_models.names())
    if address is None:
        return reward_models.load(name, path, dtype=dtype)
    if not _is_reward_model(find(address)):
        raise ConfigError(f"{address} takes pictures; a part of a composite must derive from reward_models.Scorer.")
    return build(address, path, torch.device("cpu"), dtype)


def source(name: str, weights: str | None) -> str | None:
    """Return a hash of the code and the weights of a scorer, or of the parts of a composite, that are a user's own.

    None if there is no code of that kind.
    """
    if name == COMPOSITE and weights is not None:
        file = recipe_file(weights)
        sources = [source(part.name, resolved(part.path, file)) for part in read_recipe(file)[1]]
        return _digest(*filter(None, sources)) if any(sources) else None
    address = plugins.address(name, plugins.SCORERS, reward_models.names())
    if address is None:
        return None
    return _digest(plugins.load(address).source, weights_identity(weights) if weights else "")


def describe(address: str) -> str:
    """Return what a scorer says about itself, and what it can do."""
    found, plugin = find(address), plugins.load(address)
    rows = {
        "name": name_of(address),
        "prompts": "read" if reads_prompt(address) else "not read",
        "gradient": "yes" if hasattr(found, "score_tensor") else "no: it has no score_tensor",
        "code": f"{plugin.file} ({plugin.source})",
    }
    about = inspect.getdoc(found) or "It has no docstring."
    return "\n".join([f"{address}: {about}", "", *(f"{key:<14}{value}" for key, value in rows.items())])


def _is_reward_model(found: type[Any]) -> bool:
    return issubclass(found, reward_models.Scorer)


def _faults(found: Any) -> Iterator[str]:
    """Yield what keeps a class from being a scorer."""
    if not isinstance(found, type):
        yield f"it must be a class, got {type(found).__name__}"
        return
    if _is_reward_model(found):
        yield from (f"it lacks {name}" for name in sorted(found.__abstractmethods__))
        if not found.cards:
            yield "it lacks cards, which say its name and weights"
        return
    score, name = getattr(found, "score", None), getattr(found, "name", None)
    if not callable(score):
        yield "it lacks score(images, prompts) -> [N]"
    elif not _accepts(score, None, [], []):
        yield f"score must take (images, prompts), got score{inspect.signature(score)}"
    if not isinstance(name, str) or not name.strip():
        yield 'it lacks a name of its own, written in the class: name = "brightness"'


def _accepts(function: Any, *arguments: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # written in C: nothing is known
        return True
    return True


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
