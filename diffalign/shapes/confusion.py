"""Captions that are wrong for a known share, as those of pictures from the web are: what alignment has to mend.

Every attribute but the shape has one other that it is taken for (red for orange, two for three, left for right), always
the same, so that the model learns to draw the wrong one now and then, as sharply as the right one: at guidance w in
about s^w / (s^w + (1 - s)^w) of its pictures an attribute, where s is the share of wrong captions. Shapes are always
told right: a model of this size that has to keep two outlines in mind draws neither of them.
"""

import random
from dataclasses import replace

from diffalign.shapes.captions import Scene

_PAIRS = {
    "color": (("red", "orange"), ("yellow", "green"), ("cyan", "blue"), ("purple", "pink")),
    "background": (("red", "orange"), ("yellow", "green"), ("cyan", "blue"), ("purple", "pink"), ("white", "gray")),
    "count": ((2, 3),),
    "size": (("small", "large"),),
    "position": (("left", "right"), ("top", "bottom")),
}
TAKEN_FOR = {name: dict([*pairs, *(pair[::-1] for pair in pairs)]) for name, pairs in _PAIRS.items()}


def confuse(scene: Scene, rng: random.Random, share: float) -> Scene:
    """Return the scene as a careless captioner tells it: each attribute wrong with probability `share`.

    An attribute keeps its value where the other would leave a shape on a ground of its own colour, or name a held-out
    combination.
    """
    for name, others in TAKEN_FOR.items():
        other = others.get(getattr(scene, name))
        if other is None or rng.random() >= share:
            continue
        told = replace(scene, **{name: other})
        if told.color != told.background and told.held_out == scene.held_out:
            scene = told
    return scene
