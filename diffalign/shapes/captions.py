"""The caption grammar: what a scene can be, how it is worded, and which combinations are held out.

    a small red circle on the left on a blue background
    three yellow stars on a black background

Colour, shape and background of a scene form its *combination*. A fixed fifth of all combinations is held out:
no image and no preference pair of the embedded world shows one, so held-out prompts test composition.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from diffalign.errors import DataError

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 170, 70),
    "cyan": (60, 200, 220),
    "blue": (40, 80, 210),
    "purple": (130, 50, 180),
    "pink": (245, 130, 190),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
}
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
POSITIONS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
COUNTS = {1: "a", 2: "two", 3: "three"}  # "a" becomes "an" before a vowel
HELD_OUT_SHARE = 0.2

_PATTERN = re.compile(
    rf"^(?P<count>an?|two|three)"
    rf"(?: (?P<size>{'|'.join(SIZES)}))?"
    rf" (?P<color>{'|'.join(COLORS)})"
    rf" (?P<shape>{'|'.join(SHAPES)})(?:es|s)?"
    rf"(?: (?P<position>{'|'.join(POSITIONS.values())}))?"
    rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}) background$"
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Describe one picture: what its caption promises."""

    color: str
    shape: str
    background: str
    count: int = 1
    size: str | None = None  # only with count 1; None leaves it open
    position: str | None = None  # only with count 1; None leaves it open

    @property
    def held_out(self) -> bool:
        """Tell whether the combination of colour, shape and background is reserved for evaluation."""
        digest = hashlib.sha256(f"{self.color}/{self.shape}/{self.background}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    @property
    def category(self) -> str:
        """Name what the caption asks for beyond colour, shape and background."""
        if self.count > 1:
            return "count"
        if self.size and self.position:
            return "size and position"
        return "size" if self.size else "position" if self.position else "plain"

    def caption(self) -> str:
        """Word the scene."""
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        words = [COUNTS[self.count], self.size, self.color, self.shape + plural]
        words.append(POSITIONS.get(self.position or ""))
        words.append(f"on a {self.background} background")
        return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(word for word in words if word))


def parse(caption: str) -> Scene:
    """Read a caption of the grammar back into its scene.

    Raises:
        DataError: the caption is not a sentence of the embedded world.

    Example:
        >>> parse("two pink crosses on a black background").count
        2
    """
    match = _PATTERN.match(caption.strip().lower())
    if match is None:
        raise DataError(
            f'The oracle cannot read the caption "{caption}". It knows sentences such as '
            f'"{Scene(color="red", shape="circle", background="blue").caption()}".'
        )
    found = match.groupdict()
    counts = {word: number for number, word in COUNTS.items()} | {"an": 1}
    positions = {phrase: name for name, phrase in POSITIONS.items()}
    return Scene(
        color=found["color"],
        shape=found["shape"],
        background=found["background"],
        count=counts[found["count"]],
        size=found["size"],
        position=positions.get(found["position"]),
    )


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: a third plain, a third with several objects, the rest with size, position or both."""
    color = rng.choice(COLORS)
    background = rng.choice([name for name in BACKGROUNDS if name != color])
    shape = rng.choice(SHAPES)
    kind = rng.random()
    if kind < 0.3:
        return Scene(color=color, shape=shape, background=background)
    if kind < 0.6:
        return Scene(color=color, shape=shape, background=background, count=rng.choice((2, 3)))
    size = rng.choice(SIZES) if kind < 0.87 else None
    position = rng.choice(tuple(POSITIONS)) if kind >= 0.73 else None
    return Scene(color=color, shape=shape, background=background, size=size, position=position)


def scenes(seed: int, *, held_out: bool) -> Iterator[Scene]:
    """Yield an endless stream of scenes whose combination is held out, or never is."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if scene.held_out == held_out:
            yield scene


def distinct_captions(seed: int, number: int, *, held_out: bool) -> list[str]:
    """Return `number` different captions, a pure function of the seed."""
    found: dict[str, None] = {}
    for scene in scenes(seed, held_out=held_out):
        found.setdefault(scene.caption())
        if len(found) == number:
            return list(found)
    raise AssertionError("scenes() is endless")


def vocabulary() -> list[str]:
    """List every word the grammar can produce."""
    words = [*COUNTS.values(), "an", *SIZES, *COLORS, *SHAPES, *BACKGROUNDS, "on", "background"]
    words += ["crosses" if shape == "cross" else shape + "s" for shape in SHAPES]
    words += [word for phrase in POSITIONS.values() for word in phrase.split()]
    return sorted(set(words))
