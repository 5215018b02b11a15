"""Align text-to-image diffusion models with human preferences: train, score, evaluate, show.

import diffalign

config = diffalign.load_config("tiny/dpo", "max_train_steps=20", output_dir="runs/first")
run = diffalign.train(config)
pictures = diffalign.generate(run, "a red circle on a blue background", seeds=[0, 1])
scores = diffalign.score(pictures, scorers="oracle")
result = diffalign.evaluate([run], prompts="embedded", scorers="oracle", show_base=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign import objectives
    from diffalign.api.drawing import generate
    from diffalign.api.evaluating import evaluate
    from diffalign.api.scoring import score
    from diffalign.api.training import load_config, train

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate", "generate", "load_config", "objectives", "score", "train"]

# Where each name lives. It is imported when it is asked for: `import diffalign` alone takes neither torch nor seconds.
_HOMES = {
    "evaluate": "diffalign.api.evaluating",
    "generate": "diffalign.api.drawing",
    "load_config": "diffalign.api.training",
    "score": "diffalign.api.scoring",
    "train": "diffalign.api.training",
}


if not TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> Any:
        """Return a public name, importing what it needs (PEP 562)."""
        if name == "objectives":
            return importlib.import_module("diffalign.objectives")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return list(__all__)
