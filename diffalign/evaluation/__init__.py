"""Draw pictures with two models, score them, say who wins and how sure that is, and show it.

base = generate_to("out/base", pipeline, prompts, seeds, settings, identity="base")
dpo = generate_to("out/dpo", trained_pipeline, prompts, seeds, settings, identity="dpo")
base.require_comparable(dpo)
comparison = Comparison.from_tables(
    score_table(base.paths, base.prompts, scorers, model="base", **base.columns),
    score_table(dpo.paths, dpo.prompts, scorers, model="dpo", **dpo.columns),
)
comparison.write("out")
write_report("out/report.html", comparison, {"base": base.images, "dpo": dpo.images})
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.evaluation.comparison import Comparison, pick_prompts
    from diffalign.evaluation.generation import SamplingSettings, generate, generate_to, prompt_plan
    from diffalign.evaluation.grid import comparison_grid, grid_of, save_grid
    from diffalign.evaluation.manifest import Manifest
    from diffalign.evaluation.negative_branch import with_negative_branch
    from diffalign.evaluation.pages import Look, save_pages
    from diffalign.evaluation.report import write_report
    from diffalign.evaluation.results import AttributeResult, Bootstrap, ScorerResult
    from diffalign.evaluation.scoring import attribute_table, score_table
    from diffalign.evaluation.several import Evaluation

# By module, imported when one is asked for: diffusers and matplotlib take seconds that `diffalign score` does not need.
_HOMES = {
    "comparison": ("Comparison", "pick_prompts"),
    "generation": ("SamplingSettings", "generate", "generate_to", "prompt_plan"),
    "grid": ("comparison_grid", "grid_of", "save_grid"),
    "manifest": ("Manifest",),
    "negative_branch": ("with_negative_branch",),
    "pages": ("Look", "save_pages"),
    "report": ("write_report",),
    "results": ("AttributeResult", "Bootstrap", "ScorerResult"),
    "scoring": ("attribute_table", "score_table"),
    "several": ("Evaluation",),
}

__all__ = [
    "AttributeResult",
    "Bootstrap",
    "Comparison",
    "Evaluation",
    "Look",
    "Manifest",
    "SamplingSettings",
    "ScorerResult",
    "attribute_table",
    "comparison_grid",
    "generate",
    "generate_to",
    "grid_of",
    "pick_prompts",
    "prompt_plan",
    "save_grid",
    "save_pages",
    "score_table",
    "with_negative_branch",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Return a public name of one of the modules (PEP 562)."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
