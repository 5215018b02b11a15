"""The embedded world as a detector for GenEval and as an answerer for DPG-Bench: both benchmarks run here, for real."""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffalign.errors import DataError
from diffalign.shapes.captions import parse
from diffalign.shapes.oracle import find, measure

YES = 0.5  # an attribute that the oracle scores at least this is shown
_QUESTION = re.compile(r'^Does the picture show the (?P<attribute>\w+) of "(?P<caption>[^"]+)"\?$')
_CATEGORIES = {
    "shape": "entity - whole",
    "color": "attribute - color",
    "count": "other - count",
    "size": "attribute - size",
    "position": "relation - spatial",
    "background": "global",
}


def geneval_record(caption: str) -> dict[str, Any]:
    """Return what GenEval is told of a caption: so many of a shape in a colour, and not one more."""
    scene = parse(caption)
    include = [{"class": scene.shape, "count": scene.count, "color": scene.color}]
    exclude = [{"class": scene.shape, "count": scene.count + 1}]
    return {"tag": scene.category, "include": include, "exclude": exclude, "prompt": caption}


class ShapesDetector:
    """Find the shapes of the embedded world as (box, overlap with the shape), and their colours."""

    def detect(
        self, image: Image.Image, classes: Sequence[str]
    ) -> dict[str, list[tuple[tuple[int, int, int, int], float]]]:
        """Return the objects nearest to each of the shapes named."""
        things = find(image)
        return {name: [(thing.box, thing.overlap) for thing in things if thing.shape == name] for name in classes}

    def colours(self, image: Image.Image, name: str, boxes: Sequence[tuple[int, int, int, int]]) -> list[str]:
        """Return the colour of the object in each box."""
        by_box = {thing.box: thing.color for thing in find(image)}
        return [by_box[tuple(box)] for box in boxes]


def dpg_questions(caption: str) -> list[dict[str, Any]]:
    """Return the fields of DPG-Bench's questions: is there the shape; if so, its colour, count, size and place."""
    scene = parse(caption)
    asked = ["shape", "color", "count", *(name for name in ("size", "position") if getattr(scene, name)), "background"]
    return [
        {
            "id": number,
            "text": f'Does the picture show the {name} of "{caption}"?',
            "parents": () if name in ("shape", "background") else (1,),
            "category": _CATEGORIES[name],
        }
        for number, name in enumerate(asked, start=1)
    ]


class OracleAnswerer:
    """Answer the questions of `dpg_questions` from the pixels."""

    def answer(self, image: Image.Image, questions: Sequence[str]) -> list[bool]:
        """Return whether the oracle scores the attribute asked about at least one half."""
        answers = []
        for question in questions:
            match = _QUESTION.match(question)
            if match is None:
                raise DataError(f'The oracle cannot answer "{question}": it knows the questions of dpg_questions only.')
            answers.append(measure(image, parse(match["caption"]))[match["attribute"]] >= YES)
        return answers
