"""DPG-Bench: what share of the questions about a dense prompt a picture answers with yes (Hu et al. 2024, ELLA).

The score of TencentQQGYLab/ELLA (`compute_dpg_bench.py`, arXiv:2403.05135), with any model that answers yes or no. What
is put right here: the first row of the questions counts too; categories are taken over all tiles of a prompt and after
the dependencies; a picture that cannot be read is an error, not a line on the screen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
from PIL import Image

from diffalign.errors import DataError

TILES = 4  # pictures a prompt


@dataclass(frozen=True)
class Question:
    """Ask one thing about a picture; without its parents (a dog before the dog's colour) it cannot be so."""

    id: int
    text: str
    parents: tuple[int, ...] = ()
    category: str = ""  # e.g. "entity - whole"

    @property
    def broad(self) -> str:
        """The first level of the category, e.g. "entity"."""
        return self.category.split("-")[0].strip()


class Answerer(Protocol):
    """Answer yes or no about a picture."""

    def answer(self, image: Image.Image, questions: Sequence[str]) -> Sequence[bool]:
        """Return one answer per question."""
        ...


def tile_scores(
    order: Sequence[int], answers: Mapping[int, float], parents: Mapping[int, Sequence[int]]
) -> dict[int, float]:
    """Return the scores of the questions of one picture after their dependencies.

    In the order given, a question counts 0 if a parent's score is 0 by then; parent 0 stands for none. A question
    listed before its parent therefore sees the parent's own answer, which is what the official code does.
    """
    scores = {question: float(answers[question]) for question in order}
    for question in order:
        if any(parent != 0 and scores.get(parent, 1.0) == 0 for parent in parents.get(question, ())):
            scores[question] = 0.0
    return scores


def prompt_score(
    order: Sequence[int], tiles: Sequence[Mapping[int, float]], parents: Mapping[int, Sequence[int]]
) -> float:
    """Return the mean over pictures of the mean over questions."""
    if not order or not tiles:
        raise DataError(f"A prompt's score needs questions and pictures, got {len(order)} and {len(tiles)}.")
    means = [sum(tile_scores(order, answers, parents).values()) / len(order) for answers in tiles]
    return sum(means) / len(means)


def split_tiles(grid: Image.Image, tiles: int = TILES) -> list[Image.Image]:
    """Return the pictures of the official layout: 4 in a 2 x 2 grid, row by row (or 1, which is the grid itself)."""
    if tiles == 1:
        return [grid]
    if tiles != TILES or grid.width % 2 or grid.height % 2:
        raise DataError(f"Expected a 2 x 2 grid of even size holding 4 pictures, got {grid.size} and {tiles}.")
    width, height = grid.width // 2, grid.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def evaluate(
    images: Mapping[Any, Sequence[Image.Image]], questions: Mapping[Any, Sequence[Question]], answerer: Answerer
) -> pd.DataFrame:
    """Return item, question, category, broad and score (the mean over the item's pictures), one row a question.

    Args:
        images: item -> its pictures (4 in the published protocol).
        questions: item -> its questions, in their published order.
        answerer: of the questions.
    """
    if missing := [item for item in questions if not images.get(item)]:
        raise DataError(f"{len(missing)} of {len(questions)} prompts have no picture, the first is {missing[0]!r}.")
    rows = []
    for item, asked in questions.items():
        order = [question.id for question in asked]
        parents = {question.id: question.parents for question in asked}
        tiles = []
        for image in images[item]:
            answers = answerer.answer(image, [question.text for question in asked])
            tiles.append(tile_scores(order, dict(zip(order, map(float, answers), strict=True)), parents))
        for q in asked:
            score = sum(tile[q.id] for tile in tiles) / len(tiles)
            rows.append({"item": item, "question": q.id, "category": q.category, "broad": q.broad, "score": score})
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame) -> dict[str, Any]:
    """Return 100 x the mean over prompts, and 100 x the mean over questions of each broad and each full category."""
    return {
        "overall": 100 * float(results.groupby("item")["score"].mean().mean()),
        "prompts": int(results["item"].nunique()),
        **{
            level: {str(name): 100 * float(mean) for name, mean in results.groupby(level)["score"].mean().items()}
            for level in ("broad", "category")
        },
    }
