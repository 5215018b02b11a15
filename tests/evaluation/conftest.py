"""A comparison of two models on five prompts, made from painted pictures."""

import pytest

from diffalign.evaluation import Bootstrap, Comparison, attribute_table, score_table
from tests.evaluation.toy import ALIGNED_LEVELS, BASE_LEVELS, PROMPTS, Brightness, Contrast, painted


@pytest.fixture
def images():
    """Return the pictures of both models by (prompt_id, seed)."""
    return {
        model: {(index, index): painted(level, seed=index) for index, level in enumerate(levels)}
        for model, levels in (("base", BASE_LEVELS), ("dpo", ALIGNED_LEVELS))
    }


@pytest.fixture
def comparison(images):
    """Return the comparison of those pictures by both scorers, with attributes."""
    tables = {}
    for model, pictures in images.items():
        columns = {"model": model, "prompt_id": list(range(5)), "seed": list(range(5))}
        files = list(pictures.values())
        scores = score_table(files, PROMPTS, [Brightness(), Contrast()], **columns)
        tables[model] = scores, attribute_table(files, PROMPTS, [Brightness(), Contrast()], **columns)
    return Comparison.from_tables(
        tables["base"][0],
        tables["dpo"][0],
        base_attributes=tables["base"][1],
        aligned_attributes=tables["dpo"][1],
        bootstrap=Bootstrap(resamples=500),
        settings={"guidance_scale": 5.0, "scheduler": {"class": "EulerDiscreteScheduler"}},
    )
