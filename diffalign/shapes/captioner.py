"""A captioner for the embedded world: what a picture shows, worded like its prompt."""

from dataclasses import replace

from PIL import Image

from diffalign.shapes.captions import BACKGROUNDS, COLORS, COUNTS, POSITIONS, SHAPES, SIZES, parse
from diffalign.shapes.oracle import measure

CHOICES = {
    "background": BACKGROUNDS,
    "color": COLORS,
    "count": tuple(COUNTS),
    "shape": SHAPES,
    "size": SIZES,
    "position": tuple(POSITIONS),
}


def describe(image: Image.Image, prompt: str) -> str:
    """Return a caption that says of `image` what `prompt` says of its scene: the same attributes, the values shown.

    Each attribute takes the value that the oracle finds most fitting; where several fit alike, that of the prompt. This
    is the part that LLaVA or Emu2, shown image and prompt, have in DCPO (2502.06023).

    Raises:
        DataError: the prompt is not a sentence of the embedded world.
    """
    scene = parse(prompt)
    for name, values in CHOICES.items():
        if name in ("size", "position") and (getattr(scene, name) is None or scene.count > 1):
            continue
        if name == "count" and (scene.size or scene.position):
            continue
        own = getattr(scene, name)
        fits = {value: measure(image, replace(scene, **{name: value}))[name] for value in (own, *values)}
        best = max(fits.values())
        scene = scene if fits[own] == best else replace(scene, **{name: max(fits, key=fits.get)})
    return scene.caption()
