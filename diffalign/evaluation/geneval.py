"""GenEval's verdict on a picture, from what any detector found in it (Ghosh et al. 2023, arXiv:2310.11513).

The rules are those of djghosh13/geneval (`evaluate_images.py`); the detector and the colour classifier, there
Mask2Former through mmdet 2 and CLIP ViT-L/14, are whatever implements `Detector`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pandas as pd
from PIL import Image

from diffalign.errors import DataError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2; y grows downwards
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's confidence
MOST_OBJECTS = 16  # of a class


class Detection(NamedTuple):
    """Say where something is and how sure that is; any (box, confidence) will do."""

    box: Box
    confidence: float


class Detector(Protocol):
    """Find objects of named classes, and name the colours of those found."""

    def detect(self, image: Image.Image, classes: Sequence[str]) -> Mapping[str, Sequence[Detection]]:
        """Return the detections of every class, in any order and of any confidence."""
        ...

    def colours(self, image: Image.Image, name: str, boxes: Sequence[Box]) -> list[str]:
        """Return the colour of the object in each box."""
        ...


@dataclass(frozen=True)
class Verdict:
    """Say whether a picture shows what was asked for, and what it lacks."""

    correct: bool
    reasons: tuple[str, ...] = ()


def relative_position(a: Box, b: Box, threshold: float = 0.1) -> set[str]:
    """Return where box a is, seen from box b: any of "left of", "right of", "above", "below".

    off = centre_a - centre_b;  rev = max(|off| - threshold (size_a + size_b), 0) sign(off);  (dx, dy) = rev / |off|
    left of: dx < -1/2, right of: dx > 1/2, above: dy < -1/2, below: dy > 1/2; none if |rev| < 1e-3 on both axes.
    """
    off = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    size = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    rev = [math.copysign(max(abs(o) - threshold * s, 0.0), o) for o, s in zip(off, size, strict=True)]
    if all(abs(value) < 1e-3 for value in rev):
        return set()
    dx, dy = (value / math.hypot(*off) for value in rev)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in names.items() if holds}


def judge(
    objects: Mapping[str, Sequence[Box]], colours: Mapping[str, Sequence[str]], record: Mapping[str, Any]
) -> Verdict:
    """Return the verdict on one picture.

    Args:
        objects: the boxes of every class, the most confident first.
        colours: the colours of these boxes, in their order; only for the classes of which a colour is asked.
        record: a line of evaluation_metadata.jsonl: include [{class, count, color?, position?: [relation, index]}],
            exclude [{class, count}].
    """
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for wanted in record.get("include", ()):
        found = list(objects.get(wanted["class"], ()))[: wanted["count"]]
        lacks = _lacks(wanted, found, colours, groups)
        groups.append(None if lacks else found)
        reasons += [lacks] if lacks else []
    for banned in record.get("exclude", ()):
        number = len(objects.get(banned["class"], ()))
        if number >= banned["count"]:
            reasons.append(f"expected fewer than {banned['count']} of {banned['class']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def evaluate(images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]], detector: Detector) -> pd.DataFrame:
    """Return prompt, tag, correct and reason: one row a picture, `records` saying what each was asked to show."""
    if len(images) != len(records):
        raise DataError(f"Got {len(images)} pictures but {len(records)} records: every picture needs its own.")
    rows = []
    for image, record in zip(images, records, strict=True):
        verdict = judge(*_seen(image, record, detector), record)
        rows.append(
            {
                "prompt": record["prompt"],
                "tag": record["tag"],
                "correct": verdict.correct,
                "reason": "; ".join(verdict.reasons),
            }
        )
    return pd.DataFrame(rows)


def overall(tasks: Mapping[str, float]) -> float:
    """Return GenEval's score: the unweighted mean of the accuracies of its tasks."""
    if not tasks:
        raise DataError("GenEval's score is a mean over tasks; there is none.")
    return sum(tasks.values()) / len(tasks)


def summarise(results: pd.DataFrame) -> dict[str, Any]:
    """Return the accuracy of each task, their mean, and the share of pictures and of prompts (any picture) correct."""
    tasks = {str(tag): float(share) for tag, share in results.groupby("tag", sort=False)["correct"].mean().items()}
    return {
        "tasks": tasks,
        "overall": overall(tasks),
        "pictures": float(results["correct"].mean()),
        "prompts": float(results.groupby("prompt")["correct"].any().mean()),
        "missing_tasks": [task for task in TASKS if task not in tasks],
    }


def _seen(
    image: Image.Image, record: Mapping[str, Any], detector: Detector
) -> tuple[dict[str, list[Box]], dict[str, list[str]]]:
    """Return boxes and colours as `judge` takes them: sure enough, sorted, at most sixteen of a class."""
    classes = list(dict.fromkeys(entry["class"] for key in ("include", "exclude") for entry in record.get(key, ())))
    least = COUNTING_THRESHOLD if record["tag"] == "counting" else THRESHOLD
    objects = {}
    for name, detections in detector.detect(image, classes).items():
        sure = sorted((Detection(*d) for d in detections if d[1] > least), key=lambda d: -d.confidence)
        objects[name] = [d.box for d in sure[:MOST_OBJECTS]]
    coloured = {entry["class"] for entry in record.get("include", ()) if "color" in entry}
    return objects, {name: detector.colours(image, name, objects.get(name, [])) for name in coloured}


def _lacks(
    wanted: Mapping[str, Any],
    found: Sequence[Box],
    colours: Mapping[str, Sequence[str]],
    groups: Sequence[Sequence[Box] | None],
) -> str:
    """Return what keeps a requirement from being met, or ""."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {count} of {name}, found {len(found)}"
    if "color" in wanted:
        shown = list(colours.get(name, ()))[:count]
        if shown.count(wanted["color"]) < count:
            return f"expected {wanted['color']} {name}, found {', '.join(shown) or 'none'}"
    if "position" in wanted:
        relation, index = wanted["position"]
        target = groups[index]
        if target is None:
            return f"no target for {name} to be {relation}"
        if any(relation not in relative_position(one, other) for one in found for other in target):
            return f"expected {name} {relation} target"
    return ""
